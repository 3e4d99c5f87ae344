"""Measures the price of a model in training: what it is asked, what it is compared with, and how often."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from ..engine.model_state import evaluation_mode
from .answers import answer, end_tokens
from .damage import verdict
from .divergence import answer_kl, token_logps
from .document import AnswerRecord, Price, SetPrice
from .questions import Questions
from .repetition import repeated
from .start import Start

#: Rows of one forward when likelihoods are measured.
_ROWS = 4
#: Prompts of a step of generation; each is answered twice.
_PROMPTS = 16
#: Of the random draws of sampled answers. A constant: two measurements of one model give the same numbers.
_SEED = 0


class PriceMeter:
    """Measures what training did to a model: KL on its own samples, repetition, its answers, likelihoods.

    A measurement changes neither weights nor random states. Whatever fails in it is told in `Price.missing`, and never
    raised. All processes of a run must call `measure`; each takes its part of the prompts.

    Args:
        model: the policy, unwrapped.
        tokenizer: the policy's.
        questions: what to measure it on.
        reference: the reference model; None: the policy as it is now, whose trainable weights are then kept on the CPU.
        max_new_tokens: length at which answers are cut.
        share: part of a run's time that measurements in the middle of training may take in all.
        unable: why this model cannot be measured at all; None: it can.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        questions: Questions,
        *,
        reference: Any = None,
        max_new_tokens: int = 48,
        share: float = 0.1,
        unable: str | None = None,
    ):
        self._model, self._tokenizer, self.questions = model, tokenizer, questions
        self._reference, self._new, self._share, self.unable = reference, max_new_tokens, share, unable
        self._start = Start(model) if reference is None and unable is None else None
        self._began, self._latest = time.monotonic(), 0.0
        #: Seconds that all measurements took.
        self.seconds = 0.0
        #: The reference's own answers, by set of prompts; empty before the first measurement.
        self.before: dict[str, SetPrice] = {}
        #: Every measurement so far, in order.
        self.measured: list[Price] = []

    def affordable(self) -> bool:
        """Whether one measurement more stays within the share of the time that has passed; the same on all processes."""
        passed = time.monotonic() - self._began
        answer = [self._share >= 1 or self.seconds + self._latest <= self._share * passed]
        if PartialState().num_processes > 1:
            broadcast_object_list(answer, from_process=0)
        return answer[0]

    def measure(self, step: int) -> Price:
        """The price now. Every process calls it, and gets the same."""
        if self.unable is not None:
            price = Price(step, missing=[self.unable])
        else:
            began = time.monotonic()
            price = self._measured(step)
            self._latest = time.monotonic() - began
            self.seconds += self._latest
            price = replace(price, seconds=self._latest)
        self.measured.append(price)
        return price

    def _measured(self, step: int) -> Price:
        sets, nll, missing = {}, {}, list(self.questions.missing)
        # At the start, policy and reference are one model.
        apart = step > 0 or self._start is None
        for name, prompts in self.questions.prompts.items():
            records, failed = self._shared(prompts, lambda part: self._answered(self._model, part, with_kl=apart))
            if failed is not None:
                missing.append(f"Answers to the {name} prompts were not measured: {failed}")
                continue
            sets[name] = SetPrice.of(records)
            if name not in self.before and not apart:
                self.before[name] = sets[name]
            elif name not in self.before:
                before, failed = self._shared(prompts, self._answers_of_reference)
                if failed is None:
                    self.before[name] = SetPrice.of(before)
        for name, texts in self.questions.texts.items():
            sums, failed = self._shared(texts, self._likelihoods)
            tokens = sum(count for _, count in sums)
            if failed is not None:
                missing.append(f"The likelihood of the {name} text was not measured: {failed}")
            elif tokens:
                nll[name] = -sum(logp for logp, _ in sums) / tokens
        return Price(step, sets, nll, missing=missing, damage=verdict(sets, self.before))

    def _shared(self, items: Sequence, work) -> tuple[list, str | None]:
        """`work` on this process's part of the numbered items, and what all processes found; or why one of them failed."""
        state, found, failed = PartialState(), [], None
        try:
            part = list(enumerate(items))[state.process_index :: state.num_processes]
            if part:
                found = work(part)
        # Whatever it is: a measurement must not end a training, and the other processes wait for this one.
        except Exception as error:
            failed = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        gathered = gather_object([(found, failed)]) if state.num_processes > 1 else [(found, failed)]
        first = next((reason for _, reason in gathered if reason is not None), None)
        return [item for part, _ in gathered for item in part] if first is None else [], first

    @contextmanager
    def _as_reference(self) -> Iterator[Any]:
        if self._start is None:
            yield self._reference
        else:
            with self._start.put_back(self._model):
                yield self._model

    def _answers_of_reference(self, part: list[tuple[int, Sequence[int]]]) -> list[AnswerRecord]:
        with self._as_reference() as model:
            return self._answered(model, part, with_kl=False)

    def _answered(self, model, part: list[tuple[int, Sequence[int]]], *, with_kl: bool) -> list[AnswerRecord]:
        records = []
        ends = end_tokens(model, self._tokenizer)
        pad = self._tokenizer.pad_token_id
        pad = pad if pad is not None else ends[0] if ends else 0
        with evaluation_mode(self._model, self._reference):
            torch.manual_seed(_SEED)
            for at in range(0, len(part), _PROMPTS):
                some = part[at : at + _PROMPTS]
                prompts, count = [list(prompt) for _, prompt in some], len(some)
                rows = prompts * 2 if with_kl else prompts
                answers = answer(model, rows, greedy=count, max_new_tokens=self._new, ends=ends, pad=pad)
                sampled, kl = answers.sampled(count), [0.0] * count
                if with_kl:
                    with self._as_reference() as reference:
                        # Rounding can take a KL of nothing below 0.
                        kl = answer_kl(sampled, reference).sum(1).clamp(min=0).tolist()
                for row, (index, prompt) in enumerate(some):
                    tokens = answers.tokens(row)
                    said, grams = repeated(tokens)
                    records.append(
                        AnswerRecord(
                            index=index,
                            prompt=self._text(prompt),
                            greedy=self._text(tokens),
                            repeated=said,
                            grams=grams,
                            tokens=len(tokens),
                            ended=bool(answers.ended[row]),
                            kl=kl[row],
                            sampled_tokens=len((sampled if with_kl else answers).tokens(row)),
                        )
                    )
        return records

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _likelihoods(self, part: list[tuple[int, tuple[Sequence[int], Sequence[int]]]]) -> list[tuple[float, int]]:
        """Of each text the sum of its log-probabilities, and its tokens."""
        found = []
        device = self._model.get_input_embeddings().weight.device
        with evaluation_mode(self._model):
            for at in range(0, len(part), _ROWS):
                texts = [text for _, text in part[at : at + _ROWS]]
                wide, last = max(len(given) + len(said) for given, said in texts), max(len(said) for _, said in texts)
                ids = torch.zeros(len(texts), wide, dtype=torch.long)
                mask, scored = torch.zeros_like(ids, dtype=torch.bool), torch.zeros(len(texts), last, dtype=torch.bool)
                for row, (given, said) in enumerate(texts):
                    whole = [*given, *said]
                    ids[row, wide - len(whole) :] = torch.tensor(whole)
                    mask[row, wide - len(whole) :] = True
                    scored[row, last - len(said) :] = True
                logps = token_logps(self._model, ids.to(device), mask.to(device), last).cpu()
                found += [(float(row[here].sum()), int(here.sum())) for row, here in zip(logps, scored, strict=True)]
        return found
