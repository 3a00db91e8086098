"""Training streams in MLX: data, segments, losses, the loop, self-distillation.

data ──► batches ──► base states (once, no gradient) ──► segments of stream rows ──► loss
│
adapter folder ◄── checkpoint ◄── optimizer ◄── gradients of the stream weights ◄─────┘
"""
