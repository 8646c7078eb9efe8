// The token operators on CPU in float32: one pass where ATen needs fifty small calls.
// The same results as matching.py and merging.py, which are the meaning of the operators; only the last bit of a norm
// may differ, because its squares are added in another order. Plain C interface, no headers of PyTorch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

namespace {

enum Strategy { PRUNE = 0, MEAN = 1, MLERP = 2 };

float length_of(const float* row, int64_t features) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < features; ++i) sum += row[i] * row[i];
  return std::sqrt(sum);
}

// Who leaves a sample, and where every token goes. score [candidates, stride]: candidate c is token
// prefix + candidate[c], partner p is token prefix + partner[p]. Equal scores are decided for the first, of candidates
// and of partners.
void choose(const float* score, int64_t tokens, int64_t prefix, int64_t candidates, const int64_t* candidate,
            const int64_t* partner, int64_t partners, int64_t stride, int64_t r, int64_t* assignment, int64_t* kept) {
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
    joins[prefix + candidate[c]] = prefix + partner[std::find(row, row + partners, best[c]) - row];
  }
  int64_t place = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    if (joins[t] >= 0) continue;
    kept[place] = t;
    assignment[t] = place++;
  }
  for (int64_t t = 0; t < tokens; ++t) {
    if (joins[t] >= 0) assignment[t] = assignment[joins[t]];
  }
}

// The sources of each place of one sample as linked lists, in the order of the stream; -1 ends a list.
void link(int64_t tokens, int64_t left, const int64_t* assignment, const int64_t* kept, int64_t* first, int64_t* next) {
  std::fill(first, first + left, -1);
  for (int64_t t = tokens - 1; t >= 0; --t) {
    const int64_t place = assignment[t];
    if (kept[place] == t) continue;
    next[t] = first[place];
    first[place] = t;
  }
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
  const float weight = size[destination];
  for (int64_t i = 0; i < features; ++i) out[i] = weight * own[i];
  for (int64_t s = source; s >= 0; s = next[s]) {
    const float w = size[s];
    const float* row = x + s * features;
    for (int64_t i = 0; i < features; ++i) out[i] += w * row[i];
  }
  if (strategy == MEAN) {
    for (int64_t i = 0; i < features; ++i) out[i] /= total;
    return;
  }
  int64_t chosen = destination;
  float largest = length_of(own, features);
  for (int64_t s = source; s >= 0; s = next[s]) {
    const float norm = length_of(x + s * features, features);
    if (norm > largest || (norm == largest && s < chosen)) chosen = s, largest = norm;
  }
  const float length = length_of(out, features);
  if (length == 0) {  // the members cancel: the one that is the largest, the first of equals
    std::memcpy(out, x + chosen * features, features * sizeof(float));
    return;
  }
  const float scale = largest / length;
  for (int64_t i = 0; i < features; ++i) out[i] *= scale;
}

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

// x [batch, tokens, features] by assignment [batch, tokens] and kept [batch, left] -> out, out_size.
EXPORT void tofu_merge(const float* x, const float* size, const int64_t* assignment, const int64_t* kept, int64_t batch,
                int64_t tokens, int64_t left, int64_t features, int64_t strategy, float* out, float* out_size,
                int64_t threads) {
  std::vector<int64_t> first(batch * left), next(batch * tokens);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t b = 0; b < batch; ++b) {
      link(tokens, left, assignment + b * tokens, kept + b * left, first.data() + b * left, next.data() + b * tokens);
    }
#pragma omp for
    for (int64_t i = 0; i < batch * left; ++i) {
      const int64_t b = i / left;
      merge(x + b * tokens * features, size + b * tokens, features, kept[i], first[i], next.data() + b * tokens,
            strategy, out + i * features, out_size + i);
    }
  }
}

// score [batch, height, stride] -> assignment [batch, tokens], kept [batch, tokens - r].
EXPORT void tofu_choose(const float* score, int64_t batch, int64_t tokens, int64_t prefix, int64_t candidates,
                 const int64_t* candidate, const int64_t* partner, int64_t partners, int64_t height, int64_t stride,
                 int64_t r, int64_t* assignment, int64_t* kept, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t b = 0; b < batch; ++b) {
    choose(score + b * height * stride, tokens, prefix, candidates, candidate, partner, partners, stride, r,
           assignment + b * tokens, kept + b * (tokens - r));
  }
}

}  // extern "C"
