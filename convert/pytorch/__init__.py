"""Speculative Streaming in PyTorch: the reference model, self-distillation and a trainer.

    backbone    a Hugging Face decoder seen as embed, layers, norm, head
    adapters    everything that is trained      condition   parent-conditioned candidates
    model       the dense reference, oracle of every parity test
    checkpoint  schema 1, read and written

    distill     the model's own answers         states      what the frozen base computes for them
    data        texts, positions, batches       packed      the fast forward of stream rows
    loss        cross-entropy on a vocabulary subset
    objectives  lossless, shared, pruner        workers     several processes, one step
    train       the loop                        measure, evaluate   tokens per step
"""
