"""A teacher that writes words, a student that writes letters: answers compared as text, against no teacher.

    python scripts/methods/other_tokenizers/proof.py [--seeds 3] [--forms onto_student] [--out DIR]

Pictures of 12 x 12 belong to one of sixteen smooth patterns, moved, scaled in contrast, covered with noise;
the answer is the pattern's name, such as "large green star". A teacher (convolutions, and a GRU that writes
tokens of a byte-level tokenizer with merges) learns 2,000 pictures; a student (a perceptron, and a GRU that
writes single bytes) gets 400 others. The arms of a seed differ in what is beside the student's cross-entropy:
nothing, the term response_cross by llava_kd's own stretches, pairs and loss, the same without its sorted
part, the other forms of the term that --forms names, and, as what there is to reach, the forward divergence
from a teacher that writes bytes too. Reported: names of 2,000 further pictures of which every token, after
those before it, is the likeliest, and the paired differences to no teacher.

Shape legend: N pictures, T tokens, B pictures of a step, D width, V vocabulary, S stretches.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from llava_kd.data.sources.conversation import Record
from llava_kd.data.text.encoder import Encoded
from llava_kd.data.text.stretches import Speller, stretched
from llava_kd.losses.cross.projection import Onto, Projection, projected_loss_by_chunk
from llava_kd.losses.cross.stretches import Distance, Stretched, Words, stretch_loss_by_chunk
from llava_kd.models.words.pairs import Pairs, pairs_of
from llava_kd.models.words.projection import rules_of
from llava_kd.models.words.spelling import spelled
from llava_kd.search.findings.statistics import as_text, estimate, paired

SIDE, FEW, MANY, TESTED = 12, 400, 2000, 2000
TEACHER_EPOCHS, STUDENT_EPOCHS = 30, 150
NAMES = [
    f"{size} {colour} {shape}"
    for size in ("small", "large")
    for colour in ("red", "green")
    for shape in ("circle", "square", "triangle", "star")
]
END = "<end>"
NONE, CROSS, PAIRED, SAME = (
    "no teacher", "response_cross", "response_cross, unpaired 0", "a teacher of the student's tokenizer"
)  # fmt: skip
ARMS = (NONE, CROSS, PAIRED, SAME)
FORMS = ("onto_teacher", "onto_student")  # further arms, where asked for
WEIGHT = 1.0  # of the divergence beside 1 of cross-entropy


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Byte-level; with the 256 letters and the end alone, or with merges of the names."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(NAMES if size > 257 else [], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


def encoded(name: str, by: PreTrainedTokenizerFast) -> Encoded:
    """A name and its end. The first token has no row of its own before it: it is that of the picture."""
    made = by(name, return_offsets_mapping=True)
    ids = [0, *made["input_ids"], by.get_vocab()[END]]
    spans = [(0, 0, 0, 0), *((0, a, b, 0) for a, b in made["offset_mapping"]), (0, len(name), len(name), 1)]
    labels = torch.tensor(ids)
    labels[0] = -100
    return Encoded(
        ids=torch.tensor(ids),
        labels=labels,
        visual=torch.zeros(len(ids), dtype=torch.bool),
        spans=torch.tensor(spans),
    )


class Writer(nn.Module):
    """Pictures to names: states that a head reads, one a token, of the picture and the tokens before."""

    def __init__(self, body: nn.Module, width: int, names: list[Encoded], vocabulary: int) -> None:
        super().__init__()
        self.body, self.embed = body, nn.Embedding(vocabulary, width)
        self.cell, self.head = nn.GRU(width, width, batch_first=True), nn.Linear(width, vocabulary)
        longest = max(len(name.ids) for name in names)
        self.names_CT = torch.stack(
            [nn.functional.pad(name.labels, (0, longest - len(name.labels)), value=-100) for name in names]
        )

    def forward(self, images: Tensor, classes_B: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, D] states and [B, T] what follows each."""
        labels_BT = self.names_CT[classes_B]
        words_BTD = self.embed(labels_BT[:, :-1].clamp_min(0))
        states_BTD, _ = self.cell(words_BTD + self.body(images).unsqueeze(1))
        return states_BTD, labels_BT[:, 1:]

    def loss(self, states_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        return cross_entropy(self.head(states_BTD).flatten(0, 1), targets_BT.flatten(), ignore_index=-100)

    @torch.no_grad()
    def writes(self, images: Tensor, classes_N: Tensor) -> float:
        """Per cent of the names written without a fault: each token the likeliest after those before it."""
        states_NTD, targets_NT = self(images, classes_N)
        is_right_NT = (self.head(states_NTD).argmax(2) == targets_NT) | (targets_NT == -100)
        return 100 * float(is_right_NT.all(1).double().mean())


def pictures(number: int, patterns: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[N, 1, SIDE, SIDE] and their classes."""
    classes_N = torch.randint(0, len(NAMES), (number,), generator=generator)
    moves_N2 = torch.randint(-2, 3, (number, 2), generator=generator)
    moved = [
        torch.roll(patterns[c], (int(y), int(x)), (0, 1))
        for c, (y, x) in zip(classes_N.tolist(), moves_N2, strict=True)
    ]
    contrast = 0.5 + torch.rand(number, 1, 1, generator=generator)
    noise = 0.8 * torch.randn(number, SIDE, SIDE, generator=generator)
    return (torch.stack(moved) * contrast + noise).unsqueeze(1), classes_N


def smooth_patterns(generator: torch.Generator) -> Tensor:
    coarse = torch.randn(len(NAMES), 1, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic").squeeze(1)
    return smooth / smooth.flatten(1).std(1).view(-1, 1, 1)


def train_teacher(
    names: list[Encoded], vocabulary: int, images: Tensor, classes_N: Tensor, generator: torch.Generator
) -> Writer:
    body = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(288, 64),
    )  # fmt: skip
    teacher = Writer(body, 64, names, vocabulary)
    optimiser = torch.optim.Adam(teacher.parameters(), lr=2e-3)
    for _ in range(TEACHER_EPOCHS):
        for rows in torch.randperm(len(images), generator=generator).split(100):
            optimiser.zero_grad()
            teacher.loss(*teacher(images[rows], classes_N[rows])).backward()
            optimiser.step()
    return teacher.eval().requires_grad_(False)


def stretches_of(
    writer: Writer, states_BTD: Tensor, targets_BT: Tensor, names: list[Encoded], classes_B: Tensor
) -> Stretched:
    """The rows of a step that each stretch of its names has on one side."""
    longest = targets_BT.shape[1]
    first, further, of, count = [], [], [], 0
    for b, c in enumerate(classes_B.tolist()):
        numbers = names[c].stretches
        assert numbers is not None
        seen: set[int] = set()
        for t, number in enumerate(numbers.tolist()[1:]):
            if number in seen:
                further.append(b * longest + t)
                of.append(count + number - 1)
            elif number > 0:
                first.append(b * longest + t)
                seen.add(number)
        count += len(seen)
    flat_D, rows_R = states_BTD.flatten(0, 1), torch.tensor(further, dtype=torch.long)
    return Stretched(
        first_SD=flat_D[torch.tensor(first)],
        first_tokens_S=targets_BT.flatten()[torch.tensor(first)],
        further_RD=flat_D[rows_R],
        tokens_R=targets_BT.flatten()[rows_R],
        stretch_R=torch.tensor(of, dtype=torch.long),
        head_VD=writer.head.weight,
        bias_V=writer.head.bias,
    )


def train_student(
    names: list[Encoded],
    data: tuple[Tensor, Tensor],
    teacher: tuple[Writer, list[Encoded], Words | Projection] | None,
    distance: Distance,
    seed: int,
) -> Writer:
    """`names` and the teacher's hold their common stretches."""
    torch.manual_seed(seed)
    images, classes_N = data
    body = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 32))
    student = Writer(body, 32, names, 257)
    optimiser = torch.optim.Adam(student.parameters(), lr=2e-3)
    order = torch.Generator().manual_seed(seed)
    for _ in range(STUDENT_EPOCHS):
        for rows in torch.randperm(len(images), generator=order).split(40):
            optimiser.zero_grad()
            states_BTD, targets_BT = student(images[rows], classes_N[rows])
            loss = student.loss(states_BTD, targets_BT)
            if teacher is not None:
                writer, theirs, words = teacher
                said = writer(images[rows], classes_N[rows])
                mine = stretches_of(student, states_BTD, targets_BT, names, classes_N[rows])
                other = stretches_of(writer, *said, theirs, classes_N[rows])
                if isinstance(words, Projection):
                    term = projected_loss_by_chunk(mine, other, words, distance)
                else:
                    term = stretch_loss_by_chunk(mine, other, words, distance)
                loss = loss + WEIGHT * term.loss / len(mine.first_SD)
            loss.backward()
            optimiser.step()
    return student


def carried(
    form: Onto,
    pairs: Pairs,
    words: Words,
    letters: PreTrainedTokenizerFast,
    merged: PreTrainedTokenizerFast,
) -> Projection:
    """As the term carries one vocabulary into the other, each token to the first of its pieces."""
    same = dict(zip(pairs.student, pairs.teacher, strict=True))
    if form == "onto_teacher":
        rules = rules_of(letters, merged, same)
    else:
        rules = rules_of(merged, letters, {theirs: mine for mine, theirs in same.items()})
    return Projection(form, words, *map(torch.tensor, (rules.source, rules.target, rules.weight)))


def one_seed(seed: int, forms: Sequence[Onto] = ()) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    patterns = smooth_patterns(generator)
    many, few, test = (pictures(number, patterns, generator) for number in (MANY, FEW, TESTED))
    letters, merged = tokenizer(257), tokenizer(300)
    found: dict[str, float] = {}
    teachers: dict[str, tuple[Writer, list[Encoded], Words | Projection]] = {}
    own: dict[str, list[Encoded]] = {}
    for arm, theirs in ((CROSS, merged), (SAME, letters)):
        spellers = [Speller(spelled(one), frozenset({one.get_vocab()[END]})) for one in (letters, theirs)]
        both = [
            stretched(
                Record(id=name, images=(), turns=()), (encoded(name, letters), encoded(name, theirs)),
                (spellers[0], spellers[1]),
            )
            for name in NAMES
        ]  # fmt: skip
        own[arm], names = [one for one, _ in both], [other for _, other in both]
        writer = train_teacher(names, len(theirs), *many, generator)
        ends = letters.get_vocab()[END], theirs.get_vocab()[END]
        made = pairs_of(letters, theirs, ends, student_rows=len(letters), teacher_rows=len(theirs))
        columns = (made.student, made.teacher, made.student_alone, made.teacher_alone)
        kinds = ("student_K", "teacher_K", "student_A", "teacher_B")
        words = Words(**{k: torch.tensor(c, dtype=torch.long) for k, c in zip(kinds, columns, strict=True)})
        teachers[arm] = writer, names, words
        for form in forms if arm == CROSS else ():
            teachers[form] = writer, names, carried(form, made, words, letters, merged)
        found[f"names right, teacher of {arm}"] = writer.writes(*test)
    teachers[PAIRED], own[PAIRED] = teachers[CROSS], own[CROSS]
    for arm in (*ARMS, *forms):
        distance = Distance(unpaired=0.0 if arm == PAIRED else 1.0)
        names = own.get(arm, own[CROSS])
        found[arm] = train_student(names, few, teachers.get(arm), distance, seed).writes(*test)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=[], help="further forms of the term")
    parser.add_argument("--out", type=Path, help="folder for results.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    arms = (*ARMS, *arguments.forms)
    runs = {seed: one_seed(seed, arguments.forms) for seed in range(arguments.seeds)}
    values = {name: {seed: run[name] for seed, run in runs.items()} for name in runs[0]}
    print(f"{len(runs)} seeds; mean +- half the 95 % interval over them; per cent\n")
    for name in list(values)[: -len(arms)]:
        print(f"{name}: {as_text(estimate(list(values[name].values())))}")
    print("\n| arm | names right, % | against no teacher, paired |\n|---|---|---|")
    for arm in arms:
        gap = None if arm == NONE else paired(values[arm], values[NONE])
        print(f"| {arm} | {as_text(estimate(list(values[arm].values())))} | {as_text(gap, sign='+')} |")
    print(f"\n{time.perf_counter() - began:.0f} s")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "results.json").write_text(json.dumps(runs, indent=2) + "\n")


if __name__ == "__main__":
    main()
