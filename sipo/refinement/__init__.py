"""Refinement: the review and rewrite prompts of Eq. 4 and 5, and reading what comes back.

`TemplateBook` finds the template set for some objectives; a set turns (x, y^s) into a review `Task` and (x, y^v, y^s) into a
rewrite `Task`; a task gives the prompt as chat messages or as one text, and parses the output. Nothing here calls a model.
"""

from sipo.refinement.templates import Parsed, Task, TemplateBook, TemplateSet, name_objectives, read_template_set

__all__ = ["Parsed", "Task", "TemplateBook", "TemplateSet", "name_objectives", "read_template_set"]
