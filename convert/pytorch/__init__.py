"""Speculative Streaming in PyTorch: the reference model, self-distillation and a trainer.

* `backbone`: a Hugging Face decoder seen as embed, layers, norm, head
* `adapters`, `condition`: everything that is trained
* `model`: the dense reference that every parity test compares with
* `checkpoint`: schema 1, read and written
* `distill`, `batched`, `states`: the model's own answers, and what the frozen base computes for them
* `packed`, `loss`: the fast forward of stream rows, cross-entropy under the head
* `objectives`, `start`, `workers`, `trainer`, `train`: what is minimised and trained, several processes at one step,
  what one update is
* `measure`, `evaluate`: tokens per step

Data, batches, targets, the loop, its budget, log and options are those of `mlx_specstream.train`.
"""
