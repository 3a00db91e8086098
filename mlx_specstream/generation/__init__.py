"""Text in, text out, with mlx-lm's names and signatures.

| file | the idea it holds |
|---|---|
| `generate.py` | `generate` and `stream_generate` |
| `arguments.py` | what callers give as they would give it to mlx-lm, checked |
| `run.py` | `GenerationRun`: one answer under way, from the prompt to responses, and its end |
| `text.py` | tokens in, text out, until the answer is over |
| `stop.py` | stop strings in text that arrives in pieces |
| `prompt_progress.py` | how far the prompt is, for a person who waits |
| `response.py` | what a caller gets for every token |
| `grammar.py` | answers that fit a JSON schema, a regular expression or a grammar |
| `json_schema.py` | a JSON schema as a grammar's compiler is to read it |
| `decode_options.py` | command-line options: which model and streams, how to decode |
| `sampling_options.py` | command-line options: how tokens are drawn |
"""
