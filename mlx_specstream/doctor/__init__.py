"""The doctor: what this machine can run, what is wrong with it, and what to change.

| file | the idea it holds |
|---|---|
| `findings.py` | what is known to be wrong or limited in a combination of chip, system and versions |
| `finding.py` | one such thing: what, why, what to do |
| `mac.py` | what is known of Macs |
| `sizes.py` | how large models are, and which of them fit |
| `expected.py` | what speculation should gain with a model that is not here yet |
| `chips.py` | `doctor --chips`: predictions for Apple's chips, and those held against measurements |
| `report.py` | `doctor --report`: one file with doctor, verify, bench and predictions, for an issue |
| `part.py` | a part of it: one command, watched, bounded and stopped politely |
| `families.py` | `doctor --families`: mlx-lm's model families, and which are refused |
"""
