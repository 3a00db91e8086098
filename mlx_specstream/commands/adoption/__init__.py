"""What `specstream adopt` does: streams for a user's own model, stage by stage, stopped at any moment.

plan ──► answers ──► training ──► calibration, acceptance ──► verification ──► benchmark ──► store

| file | the idea it holds |
|---|---|
| `state.py` | where an adoption stands, in a file that is whole or old |
| `prompts.py` | what the model is asked: built-in prompts, the user's own, parts of the user's documents |
| `plan.py` | what it will take: a trial of each kind of work, and the minutes shared out |
| `stages.py` | the stages, each of which begins where it was stopped |
| `measures.py` | what the finished streams give: acceptance, exactness, speed |
| `card.py` | the card: what the streams are and what was measured |
"""
