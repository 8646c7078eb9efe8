// The token operators on CPU in float32: one pass where ATen needs fifty small calls.
// The same results as matching.py and merging.py, which are the meaning of the operators; only the last bit of a norm
// may differ, because its squares are added in another order. Plain C interface, no headers of PyTorch.

// Inductor's flags for GCC leave loops as they are, its own being written with vectors.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("tree-loop-vectorize")
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

namespace {

enum Strategy { PRUNE = 0, MEAN = 1, MLERP = 2 };

// merging.py, with half of float32's eps
constexpr float CANCELLED = 64.0f / (1 << 24), NEARLY_LARGEST = 1 - 1.0f / 1024;

// The length of a row times `scale`, a power of two.
float length_of(const float* row, int64_t features, float scale = 1) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < features; ++i) {
    const float value = row[i] * scale;
    sum += value * value;
  }
  return std::sqrt(sum);
}

float largest_entry(const float* row, int64_t features) {
  float most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < features; ++i) most = std::fabs(row[i]) > most ? std::fabs(row[i]) : most;
  return most;
}

// A power of two that brings `largest` to where squares neither overflow nor vanish; 1 for all ordinary numbers
// (merging.py: _scale).
float scale_for(float largest) {
  int exponent = 0;
  if (std::isfinite(largest)) std::frexp(largest, &exponent);
  return std::ldexp(1.0f, std::clamp(exponent, -40, 40) - exponent);
}

// Who leaves a sample, and where every token goes. score [candidates, stride]: candidate c is token
// prefix + candidate[c], partner p is token prefix + partner[p]. Equal scores are decided for the first, of candidates
// and of partners. False if a place lies outside of the sample.
bool choose(const float* score, int64_t tokens, int64_t prefix, int64_t candidates, const int64_t* candidate,
            const int64_t* partner, int64_t partners, int64_t stride, int64_t r, int64_t* assignment, int64_t* kept) {
  if (r < 1 || r > candidates || partners < 1 || partners > stride) return false;
  const auto inside = [&](int64_t place) { return place >= 0 && place < tokens - prefix; };
  if (prefix < 0 || !std::all_of(candidate, candidate + candidates, inside) ||
      !std::all_of(partner, partner + partners, inside)) {
    return false;
  }
  std::vector<float> best(candidates);
  for (int64_t c = 0; c < candidates; ++c) {
    const float* row = score + c * stride;
    float most = row[0];
#pragma omp simd reduction(max : most)
    for (int64_t p = 0; p < partners; ++p) most = row[p] > most ? row[p] : most;
    best[c] = most;
  }
  std::vector<int64_t> order(candidates);
  std::iota(order.begin(), order.end(), 0);
  std::nth_element(order.begin(), order.begin() + (r - 1), order.end(),
                   [&](int64_t a, int64_t b) { return best[a] != best[b] ? best[a] > best[b] : a < b; });
  std::vector<int64_t> joins(tokens, -1);
  for (int64_t i = 0; i < r; ++i) {
    const int64_t c = order[i];
    const float* row = score + c * stride;
    const int64_t p = std::find(row, row + partners, best[c]) - row;
    if (p == partners) return false;
    joins[prefix + candidate[c]] = prefix + partner[p];
  }
  int64_t place = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    if (joins[t] >= 0) continue;
    if (place == tokens - r) return false;
    kept[place] = t;
    assignment[t] = place++;
  }
  for (int64_t t = 0; t < tokens; ++t) {
    if (joins[t] >= 0) assignment[t] = assignment[joins[t]];
  }
  return true;
}

// The sources of each place of one sample as linked lists, in the order of the stream; -1 ends a list. False unless
// every token goes to a place that there is, and every place is that of the token which it keeps: then all of kept is in
// range, too.
bool link(int64_t tokens, int64_t left, const int64_t* assignment, const int64_t* kept, int64_t* first, int64_t* next) {
  std::fill(first, first + left, -1);
  int64_t stay = 0;
  for (int64_t t = tokens - 1; t >= 0; --t) {
    const int64_t place = assignment[t];
    if (place < 0 || place >= left) return false;
    if (kept[place] == t) {
      ++stay;
      continue;
    }
    next[t] = first[place];
    first[place] = t;
  }
  return stay == left;
}

// One place of the reduced stream: the destination and its sources. x and size are the sample's.
void merge(const float* x, const float* size, int64_t features, int64_t destination, int64_t source,
           const int64_t* next, int64_t strategy, float* out, float* out_size) {
  const float* own = x + destination * features;
  float total = size[destination];
  for (int64_t s = source; s >= 0; s = next[s]) total += size[s];
  *out_size = total;
  if (source < 0 || strategy == PRUNE) {
    std::memcpy(out, own, features * sizeof(float));
    return;
  }
  float scale = 1;
  if (strategy == MLERP) {
    float most = largest_entry(own, features);
    for (int64_t s = source; s >= 0; s = next[s]) most = std::max(most, largest_entry(x + s * features, features));
    scale = scale_for(most);
  }
  const float weight = size[destination];
  for (int64_t i = 0; i < features; ++i) out[i] = weight * (own[i] * scale);
  for (int64_t s = source; s >= 0; s = next[s]) {
    const float w = size[s];
    const float* row = x + s * features;
    for (int64_t i = 0; i < features; ++i) out[i] += w * (row[i] * scale);
  }
  if (strategy == MEAN) {
    for (int64_t i = 0; i < features; ++i) out[i] /= total;
    return;
  }
  int64_t members = 1;
  float largest = length_of(own, features, scale);
  float reach = weight * largest;  // as long as the sum could be
  for (int64_t s = source; s >= 0; s = next[s], ++members) {
    const float norm = length_of(x + s * features, features, scale);
    reach += size[s] * norm;
    largest = norm > largest ? norm : largest;
  }
  const float length = length_of(out, features);
  if (length <= CANCELLED * members * reach) {
    int64_t chosen = length_of(own, features, scale) >= NEARLY_LARGEST * largest ? destination : INT64_MAX;
    for (int64_t s = source; s >= 0; s = next[s]) {
      if (length_of(x + s * features, features, scale) >= NEARLY_LARGEST * largest) chosen = std::min(chosen, s);
    }
    std::memcpy(out, x + chosen * features, features * sizeof(float));
    return;
  }
  const float factor = largest / length, back = 1 / scale;
  for (int64_t i = 0; i < features; ++i) out[i] = out[i] * factor * back;
}

// ward.py: who of a sample joins whom by Ward's criterion. All buffers are of the free tokens.
class Ward {
 public:
  Ward(const float* metric, int64_t stride, const float* sizes, int64_t free_tokens, int64_t features)
      : free_(free_tokens), stride_((free_ + kTile - 1) / kTile * kTile), squared_(stride_ * stride_),
        size_(sizes, sizes + free_), link_(free_, -1), cost_(free_, kNever), nearest_(free_), least_(free_) {
    measure(metric, stride, features);
  }

  // goes[t]: the token that t ends up with, t itself if it stays.
  void run(int64_t r, int64_t rounds, int64_t* goes) {
    join_equal();
    for (int64_t round = 0; round < rounds; ++round) {
      find_nearest(false);
      if (settled(r)) break;
      join_mutual();
    }
    std::vector<int64_t> order(free_);
    std::iota(order.begin(), order.end(), 0);
    std::vector<bool> linked(free_);
    for (int64_t t = 0; t < free_; ++t) linked[t] = link_[t] >= 0;
    if (std::count(linked.begin(), linked.end(), true) < r) {  // each group that is left to the nearest ahead of it
      find_nearest(true);
      for (int64_t t = 0; t < free_; ++t) {
        if (linked[t]) continue;
        link_[t] = nearest_[t];
        cost_[t] = least_[t];
      }
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return linked[a] != linked[b] ? linked[a] : cost_[a] < cost_[b];
    });
    std::iota(goes, goes + free_, 0);
    for (int64_t i = 0; i < r; ++i) goes[order[i]] = link_[order[i]];
    for (int64_t t = 0; t < free_; ++t) goes[t] = goes[goes[t]];  // links lead to earlier tokens, which are done
  }

 private:
  static constexpr float kNever = std::numeric_limits<float>::infinity(), kFar = 1e30f;
  static constexpr int64_t kTile = 16, kRows = 4;

  int64_t free_, stride_;  // the rows of squared_ are padded to whole tiles
  std::vector<float> squared_, size_;
  std::vector<int64_t> link_;
  std::vector<float> cost_;
  std::vector<int64_t> nearest_;
  std::vector<float> least_;

  bool alive(int64_t t) const { return link_[t] < 0; }

  float* squared(int64_t t) { return squared_.data() + t * stride_; }

  void measure(const float* metric, int64_t stride, int64_t features) {
    std::vector<float> columns(features * stride_), away(stride_);
    for (int64_t t = 0; t < free_; ++t) {
      const float* row = metric + t * stride;
      const bool finite = std::all_of(row, row + features, [](float value) { return std::isfinite(value); });
      away[t] = finite ? 0 : kFar;
      for (int64_t f = 0; f < features; ++f) columns[f * stride_ + t] = finite ? row[f] : 0;
    }
    for (int64_t i = 0; i < stride_; i += kRows) {
      for (int64_t j = i / kTile * kTile; j < stride_; j += kTile) {
        float sums[kRows][kTile] = {};
        add_squares(columns.data() + i, columns.data() + j, features, sums);
        for (int64_t a = 0; a < kRows; ++a) {
          for (int64_t b = 0; b < kTile; ++b) {
            const float sum = std::min(std::max({sums[a][b], away[i + a], away[j + b]}), kFar);
            squared(i + a)[j + b] = squared(j + b)[i + a] = sum;
          }
        }
      }
    }
  }

  // A tile in registers: memory is touched once for each feature.
  void add_squares(const float* rows, const float* columns, int64_t features, float (&sums)[kRows][kTile]) const {
    for (int64_t f = 0; f < features; ++f, rows += stride_, columns += stride_) {
      for (int64_t a = 0; a < kRows; ++a) {
#pragma omp simd
        for (int64_t b = 0; b < kTile; ++b) sums[a][b] += (columns[b] - rows[a]) * (columns[b] - rows[a]);
      }
    }
  }

  // Each token that equals an earlier one joins the first of these.
  void join_equal() {
    for (int64_t t = 0; t < free_; ++t) {
      const float* row = squared(t);
      const int64_t first = std::find(row, row + t, 0.0f) - row;
      if (first < t) {
        link_[t] = first;
        cost_[t] = 0;
      }
    }
    const std::vector<float> before = size_;
    for (int64_t t = 0; t < free_; ++t) {
      if (link_[t] >= 0) size_[link_[t]] += before[t];
    }
  }

  // The group whose union with each group costs the least, and what it costs; the first of equals.
  void find_nearest(bool ahead) {
    std::vector<float> cost(free_), hidden(free_);
    for (int64_t t = 0; t < free_; ++t) hidden[t] = alive(t) ? 0 : kNever;
    for (int64_t t = 0; t < free_; ++t) {
      if (!alive(t)) continue;
      const int64_t stop = ahead ? t : free_;
      hidden[t] = kNever;
      least_[t] = costs_of(squared(t), size_[t], size_.data(), hidden.data(), stop, cost.data());
      hidden[t] = 0;
      nearest_[t] = least_[t] < kNever ? std::find(cost.begin(), cost.begin() + stop, least_[t]) - cost.begin() : t;
    }
  }

  // Ward's costs of one group with others, and the least of them.
  static float costs_of(const float* squared, float own, const float* size, const float* hidden, int64_t count,
                        float* cost) {
    float least = kNever;
#pragma omp simd reduction(min : least)
    for (int64_t j = 0; j < count; ++j) {
      cost[j] = squared[j] * (own * size[j] / (own + size[j])) + hidden[j];
      least = cost[j] < least ? cost[j] : least;
    }
    return least;
  }

  // Whether r links are cheaper than any that may still come: what joins later costs more.
  bool settled(int64_t r) const {
    float least = kNever;
    for (int64_t t = 0; t < free_; ++t) least = alive(t) ? std::min(least, least_[t]) : least;
    return std::count_if(cost_.begin(), cost_.end(), [&](float c) { return c < least; }) >= r;
  }

  void join_mutual() {
    struct Pair {
      int64_t keeps, goes;
      float share, rest, apart;
    };
    std::vector<Pair> pairs;
    for (int64_t t = 0; t < free_; ++t) {
      const int64_t other = nearest_[t];
      if (!alive(t) || other <= t || nearest_[other] != t) continue;
      const float sum = size_[t] + size_[other], share = size_[t] / sum, rest = size_[other] / sum;
      pairs.push_back({t, other, share, rest, squared(t)[other] * share * rest});
    }
    const auto between = [](float ours, float theirs, const Pair& p) {
      return std::clamp(ours * p.share + theirs * p.rest - p.apart, 0.0f, kFar);
    };
    for (const Pair& p : pairs) {
      float* ours = squared(p.keeps);
      const float* theirs = squared(p.goes);
      const int64_t count = free_;
      for (int64_t k = 0; k < count; ++k) ours[k] = between(ours[k], theirs[k], p);
    }
    for (auto p = pairs.begin(); p != pairs.end(); ++p) {  // of two pairs the distance is that of the earlier one's row
      float* row = squared(p->keeps);
      for (auto q = p + 1; q != pairs.end(); ++q) row[q->keeps] = between(row[q->keeps], row[q->goes], *q);
      for (int64_t k = 0; k < free_; ++k) squared(k)[p->keeps] = row[k];
    }
    for (const Pair& p : pairs) {
      link_[p.goes] = p.keeps;
      cost_[p.goes] = least_[p.goes];
      size_[p.keeps] += size_[p.goes];
    }
  }
};

}  // namespace

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT
#endif

extern "C" {

// metric [batch, tokens, features] -> unit rows of the free tokens at the start of rows [batch, height, width],
// the rest zero. A row without a usable length becomes zero.
EXPORT void tofu_unit_rows(const float* metric, int64_t batch, int64_t tokens, int64_t features, int64_t prefix,
                    int64_t free_tokens, int64_t height, int64_t width, float* rows, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < batch * height; ++i) {
    float* row = rows + i * width;
    const int64_t token = i % height;
    const int64_t filled = token < free_tokens ? features : 0;
    const float* from = metric + ((i / height) * tokens + prefix + token) * features;
    const float norm = filled ? length_of(from, features) : 0;
    for (int64_t j = 0; j < filled; ++j) {
      const float unit = from[j] / norm;
      row[j] = std::isfinite(unit) ? unit : 0;
    }
    std::fill(row + filled, row + width, 0.0f);
  }
}

// x [batch, tokens, features] by assignment [batch, tokens] and kept [batch, left] -> out, out_size. 0, with nothing
// written, if assignment and kept are not those of a reduction.
EXPORT int64_t tofu_merge(const float* x, const float* size, const int64_t* assignment, const int64_t* kept, int64_t batch,
                int64_t tokens, int64_t left, int64_t features, int64_t strategy, float* out, float* out_size,
                int64_t threads) {
  std::vector<int64_t> first(batch * left), next(batch * tokens);
  int64_t sound = 1;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for reduction(&& : sound)
    for (int64_t b = 0; b < batch; ++b) {
      sound = link(tokens, left, assignment + b * tokens, kept + b * left, first.data() + b * left,
                   next.data() + b * tokens) && sound;
    }
#pragma omp for
    for (int64_t i = 0; i < (sound ? batch * left : 0); ++i) {
      const int64_t b = i / left;
      merge(x + b * tokens * features, size + b * tokens, features, kept[i], first[i], next.data() + b * tokens,
            strategy, out + i * features, out_size + i);
    }
  }
  return sound;
}

// score [batch, height, stride] -> assignment [batch, tokens], kept [batch, tokens - r]. 0 if a place is out of range.
EXPORT int64_t tofu_choose(const float* score, int64_t batch, int64_t tokens, int64_t prefix, int64_t candidates,
                 const int64_t* candidate, const int64_t* partner, int64_t partners, int64_t height, int64_t stride,
                 int64_t r, int64_t* assignment, int64_t* kept, int64_t threads) {
  if (candidates > height) return 0;
  int64_t sound = 1;
#pragma omp parallel for num_threads(threads) reduction(&& : sound)
  for (int64_t b = 0; b < batch; ++b) {
    sound = choose(score + b * height * stride, tokens, prefix, candidates, candidate, partner, partners, stride, r,
                   assignment + b * tokens, kept + b * (tokens - r)) && sound;
  }
  return sound;
}

// metric [batch, tokens, features], size [batch, tokens] -> assignment [batch, tokens], kept [batch, tokens - r], for
// 1 <= r < free_tokens.
EXPORT void tofu_ward(const float* metric, const float* size, int64_t batch, int64_t tokens, int64_t features,
                      int64_t prefix, int64_t free_tokens, int64_t r, int64_t rounds, int64_t* assignment,
                      int64_t* kept, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t first = b * tokens + prefix;
    std::vector<int64_t> goes(free_tokens);
    Ward(metric + first * features, features, size + first, free_tokens, features).run(r, rounds, goes.data());
    int64_t place = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t f = t - prefix;
      const bool joins = f >= 0 && f < free_tokens && goes[f] != f;
      if (joins) {
        assignment[b * tokens + t] = assignment[b * tokens + prefix + goes[f]];
        continue;
      }
      kept[b * (tokens - r) + place] = t;
      assignment[b * tokens + t] = place++;
    }
  }
}

}  // extern "C"
