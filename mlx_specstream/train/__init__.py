"""Training streams: data, targets, the loop and its budget, for MLX and PyTorch; all of it for MLX.

data ──► batches ──► base states (once, no gradient) ──► segments of stream rows ──► loss
│
adapter folder ◄── checkpoint ◄── optimizer ◄── gradients of the stream weights ◄─────┘

Data (`data`, `distilled`, `rendering`, `hub_data`), what a step trains on (`batches`, `targets`, `vocabulary`), figures
(`figures`, `next_token`) and the run itself (`options`, `progress`, `loop`, `record`, `curve`) know no framework: the
PyTorch trainer in `convert/pytorch/` uses the same.

| file | the idea it holds |
|---|---|
| `awake.py` | how long this process has been awake: the clock of whoever has minutes to spend |
| `base.py` | the frozen model's part of a lossless step: run once per batch, without gradient |
| `batches.py` | which texts and which of their positions a step trains on: a function of seed and step alone |
| `builtin_prompts.py` | two hundred built-in prompts, to try distillation and training without any data of one's own |
| `calibrate.py` | the pruning threshold that keeps what would be accepted [SS §3.1.3, own rule for the value] |
| `compare.py` | what shared mode costs or gains in quality: plain next-token LoRA of the same budget beside it |
| `curve.py` | the learning curve of a run as a picture, from its log |
| `data.py` | training texts as token ids, from mlx-lm's data formats: chat, completions, tools, text |
| `decode_eval.py` | what training gave, in the currency of decoding: tokens per step over held-out prompts |
| `distilled.py` | self-distillation's data: prompts to answer, and answers that a stopped run continues |
| `drafter_loss.py` | the losses of drafters that are not streams: what each head or layer is to predict |
| `drafters.py` | training such a drafter: the same texts, batches, optimiser and budget as streams |
| `early_exit.py` | training the early-exit pruner: next-token loss where the streams join [SS §3.1.3, §4.1] |
| `estimate.py` | what a run will take, said before it starts: memory by arithmetic, memory and time by a trial |
| `figures.py` | how good drafts are, teacher-forced over held-out texts, with the whole vocabulary |
| `head.py` | cross-entropy under the frozen LM head: in chunks, with the gradient made on the way forward |
| `hub_data.py` | records of a data set on the Hugging Face hub, read by the `datasets` package as mlx-lm does |
| `initialise.py` | untrained stream weights: shapes from the config, sizes from the model they will join |
| `loop.py` | the training loop, whatever computes an update; killed at any moment, it continues exactly |
| `loss.py` | the training loss of lossless mode [SS Eq. 5, α_0 = 0], of one pass over some segments |
| `measure.py` | where the true token stands among each stream's candidates (`figures.py` says what that means) |
| `next_token.py` | where a stream's knowledge of the next token starts: a linear guess at what follows |
| `objective.py` | one batch of lossless training: the base once, then pass after pass over its segments |
| `optimizer.py` | adamW over a flat table of stream weights, with a rate per group, a schedule and clipping |
| `options.py` | how a run trains: every option, its default, its help and its bounds, in one place |
| `parallel.py` | several processes, one run: each takes every n-th text of a batch, gradients are summed |
| `progress.py` | where a run stands, how much of its budget is spent, and what the rest will take |
| `prompt_kinds.py` | several thousand built-in prompts of ten kinds, from templates |
| `pruner.py` | training the pruner alone, for streams that are finished [SS §4.1: after the streams] |
| `record.py` | the log of a run, in JSON lines |
| `rendering.py` | a conversation as decoding sees it: the prompt's very tokens, then the answer's |
| `segments.py` | segment attention: stream rows in small groups of positions, exact and without waste [SS App. C] |
| `shared.py` | shared mode [SS §3.1, Eq. 1 and 5]: one LoRA for main and streams, main attends its streams |
| `state.py` | the state of a run in one file: written under another name and renamed, so it is whole or old |
| `targets.py` | what every stream row is to predict, and how much it counts |
| `task.py` | what a run is: model, shape, data, place |
| `trainer.py` | training with MLX: batches in, stream weights out |
| `validate.py` | held-out figures while a run lasts, and how they are told |
| `vocabulary.py` | the tokens that a step's head knows: targets, frequent ones, a random draw of the others |
| `warm_start.py` | what a run takes over from trained streams: everything they know, and parts they still lack |
"""
