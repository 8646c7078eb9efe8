"""`tofu-fx demo`: a trained vision transformer on real images, plain inductor against tofu. See run.py."""
