"""Multi-objective training: preference pairs in, one LoRA policy per objective out, by TRL in a process of its own.

`data` and `methods` make pairs, `settings` says what goes into a run and comes out of it, `planning` and `sources` plan runs,
`run_folder` and `run_set` keep and publish them: they are light. `run` trains, on TRL by `trainer`.
"""
