"""Stream files, and the base model they belong to.

| file | the idea it holds |
|---|---|
| `checkpoint.py` | `streams.safetensors` and `streams_config.json`, read and written |
| `adapter_files.py` | an adapter folder: a file of tensors, and a config that says what they are |
| `drafter.py` | `drafter.safetensors` and `drafter_config.json`: other drafters than streams |
| `stream_tensors.py` | the tensors that streams consist of: names and shapes |
| `fingerprint.py` | know a base model again |
| `adopted.py` | streams made here for a user's own models |
| `shipped.py` | which streams to use: named, made here, in the model's folder, or shipped |
| `tensorfile/` | safetensors files, read strictly and written as a stream |
| `files.py` | files and folders that appear whole or not at all |
| `hub.py` | fetching from and uploading to the Hugging Face hub, every failure in one sentence |
"""
