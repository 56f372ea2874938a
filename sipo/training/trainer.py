"""TRL's DPOTrainer with what our methods add: rows that are tokens already, two terms of the loss, references that are kept on disk
and may be shifted, and checkpoints that can be resumed. No training loop of our own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from sipo.files import sync
from sipo.training.losses import nll_per_response, opposing_weight_term
from sipo.training.settings import Margin
from sipo.training.shared_prompt import share_prompts

OPPOSING = "opposing_weight"
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
START = "start_"
"""Before the names of sides: the log-probabilities of the model that training starts from, which is the unshifted reference."""


def reference_file(folder: Path, name: str) -> Path:
    """The kept log-probabilities of `name` (train or eval), float64 [pairs] each."""
    return folder / f"reference-{name}.safetensors"


@dataclass
class PairCollator(DataCollatorForPreference):  # type: ignore[misc]
    """TRL's, with the column that it does not know."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        return batch | {OPPOSING: torch.tensor([example[OPPOSING] for example in examples])}


class PairTrainer(DPOTrainer):  # type: ignore[misc]
    """Trains on rows of TokenPair.

    `alpha`: weight of Eq. 8's NLL. `margins`: other objectives' policies, whose log-ratios shift the reference (MODPO). The
    reference's log-probabilities are computed once, before training, and kept in `folder`. `on_reference` is called with the number
    of pairs after each batch of them.
    """

    _precompute_model_hash: str
    train_dataset: Dataset
    eval_dataset: Dataset | None

    def __init__(
        self, *, alpha: float, margins: Sequence[Margin], folder: Path, on_reference: Callable[[int], None], **arguments: Any
    ) -> None:
        self._alpha = alpha
        self._margins = margins
        self._folder = folder
        self._on_reference = on_reference
        super().__init__(**arguments)
        # TRL would do this itself if it were told so earlier, and first hash all weights, to name a cache of its own: minutes for a
        # model of 7B parameters. What is kept here belongs to one run.
        self._precompute_model_hash = str(folder)
        self.precompute_ref_logps = self.args.precompute_ref_log_probs = True
        self.train_dataset = self._precompute_ref_logps(self.train_dataset, "train", self.args.per_device_train_batch_size)
        if self.eval_dataset is not None:
            self.eval_dataset = self._precompute_ref_logps(self.eval_dataset, "eval", self.args.per_device_eval_batch_size)
        # Checkpoints hold the trained adapter alone. With the reference's copy beside it, transformers would load that on resuming
        # and leave the trained one as it was.
        self.model.save_pretrained = partial(self.model.save_pretrained, selected_adapters=["default"], save_embedding_layers=False)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Ours is written at the end; a checkpoint needs none."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset  # TRL's tokenisation would keep what a chat template writes after the end token

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if OPPOSING not in self._signature_columns:
            self._signature_columns.append(OPPOSING)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        # Called when TRL has put its head on the model, and before anything is computed with it.
        if name == "train":
            share_prompts(self.model.get_base_model())
            if self.is_fsdp_enabled:  # which moves and shards the model later, when training begins
                self.model.to(self.accelerator.device)
        path = reference_file(self._folder, name)
        if not path.exists():
            kept = self._reference(dataset, name, batch_size)
            if self.is_world_process_zero():
                aside = path.with_name(f".{path.name}")
                save_file(kept, aside)
                sync(aside)
                aside.rename(path)
            self.accelerator.wait_for_everyone()
        columns = load_file(path)
        for column in REFERENCE:
            dataset = dataset.add_column(column, columns[column].tolist())
        return dataset

    def _reference(self, dataset: Dataset, name: str, batch_size: int) -> dict[str, Tensor]:
        """Of chosen and rejected responses: log pi_ref(y), and with the margins
        log pi_ref(y) + sum over i of w_i · (log pi_i(y) − log pi_ref(y))."""
        base = self._columns(super()._precompute_ref_logps(dataset, name, batch_size))
        total = {column: values.clone() for column, values in base.items()}
        own_hash = self._precompute_model_hash
        for margin in self._margins:
            # TRL takes an adapter of this name for its reference, and the hash for what tells references apart.
            self.model.load_adapter(str(margin.adapter), adapter_name="ref")
            self._precompute_model_hash = f"{own_hash} {margin.adapter}"
            theirs = self._columns(super()._precompute_ref_logps(dataset, name, batch_size))
            self.model.delete_adapter("ref")
            for column in REFERENCE:
                total[column] += margin.weight * (theirs[column] - base[column])
        self._precompute_model_hash = own_hash
        start = {f"{START}{column.split('_')[1]}": values for column, values in base.items()}
        return total | start

    @staticmethod
    def _columns(dataset: Dataset) -> dict[str, Tensor]:
        return {column: torch.tensor(dataset[column], dtype=torch.float64) for column in REFERENCE}

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        found = super().compute_ref_log_probs(model, {key: value for key, value in inputs.items() if key != OPPOSING})
        self._on_reference(len(inputs["input_ids"]) // 2 * self.accelerator.num_processes)
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        assert not return_outputs, "nothing here asks for logits"
        rows = {key: value for key, value in inputs.items() if key != OPPOSING}
        seen: list[Any] = []

        def watched(**arguments: Any) -> Any:
            seen.append(model(**arguments))
            return seen[-1]

        loss = super()._compute_loss(watched, rows, False)
        mask = rows["completion_mask"][:, 1:]
        log_probs = seen[0].log_probs * mask
        if self._alpha:
            chosen, chosen_mask = log_probs.chunk(2)[0], mask.chunk(2)[0]
            loss = loss + self._alpha * nll_per_response(chosen, chosen_mask)
        if inputs[OPPOSING].any():
            chosen_sum, rejected_sum = log_probs.sum(dim=1).chunk(2)
            ratios = (chosen_sum - rows[REFERENCE[0]]) - (rejected_sum - rows[REFERENCE[1]])
            loss = loss + opposing_weight_term(self.beta * ratios, inputs[OPPOSING])
        return loss
