"""Multi-objective training: preference pairs in, one LoRA policy per objective out, by TRL in a process of its own.

`data` makes and tokenises pairs, `settings` says what goes into a run and comes out of it: both are light. Only `dpo` imports TRL.
"""
