"""Questions about documents: those that answer it, hidden among others."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from icecache.eval.ruler.documents import Collection
from icecache.eval.ruler.form import Draft

ORDER: Final = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
PREFIX: Final = " Answer:"


@dataclass(frozen=True, slots=True)
class Questions:
    """Form of `qa_1` and `qa_2`; its haystack size is the number of documents beyond those that are needed."""

    collection: Collection

    new_tokens = 32
    least = 0

    @property
    def most(self) -> int:
        """All documents but those of the question that needs most."""
        needed = max((len(question.documents) for question in self.collection.questions), default=0)
        return len(self.collection.documents) - needed

    def step(self, length: int) -> int:  # noqa: ARG002 - form's protocol
        """One document."""
        return 1

    def draft(self, rng: random.Random, size: int, length: int, index: int) -> Draft:  # noqa: ARG002
        """Write the prompt with question `index` of the data; related documents come before unrelated ones."""
        question = self.collection.questions[index]
        needed, related = list(question.documents), list(question.related)
        if size <= len(related):
            chosen = needed + rng.sample(related, size)
        else:
            taken = {*needed, *related}
            others = [i for i in range(len(self.collection.documents)) if i not in taken]
            chosen = needed + related + rng.sample(others, min(len(others), size - len(related)))
        rng.shuffle(chosen)
        body = "\n\n".join(f"Document {i}:\n{self.collection.documents[n]}" for i, n in enumerate(chosen, 1))
        context = f"{ORDER}\n\nThe following are given documents.\n\n{body}\n\n{ORDER}\n\n"
        meta = {"haystack": self.collection.source}
        return Draft(context, f"Question: {question.text}", PREFIX, question.answers, meta)
