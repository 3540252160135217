"""Early exits for a student of another architecture than the teacher's, with few pictures.

    python scripts/methods/inner_layers/exits.py [--seeds 5] [--out DIR]

The student is a residual perceptron of four blocks whose states are of one width, as a language model's are,
so that llava_kd's own exits (norm, adapter, norm, the frozen head) stand behind the first three; the teacher
is a ConvNet. Exits are matched to its output by llava_kd's target-enhanced loss, at temperature 1.

Shape legend: N pictures, D and E widths of student and teacher.
"""

from __future__ import annotations

import torch
from small_data import CLASSES, SIDE, TEACHER_WIDTH, Data, accuracy, kd, make_data, report, train
from torch import Tensor, nn

from llava_kd.distill.terms.inner.exit_logits import Exit
from llava_kd.losses.head_loss import head_loss
from llava_kd.losses.inner.exits import Form, enhanced
from llava_kd.losses.inner.hint import hint_rows

WIDTH, BLOCKS = 32, 4
ARMS: dict[str, tuple[float, Form] | str | None] = {
    "no teacher": None,
    "KD": None,
    "KD + hint mse": "mse",
    "KD + exits, gamma 1": (1.0, "paper"),
    "KD + exits, gamma 1, code": (1.0, "code"),
    "KD + exits, gamma 1.5": (1.5, "paper"),
    "KD + exits, gamma 1.5, code": (1.5, "code"),
}


class Student(nn.Module):
    """States behind the stem and each block; the head reads the last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, WIDTH))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
            for _ in range(BLOCKS)
        )
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def states(self, images: Tensor) -> list[Tensor]:
        found = [self.stem(images)]
        for block in self.blocks:
            found.append(found[-1] + block(found[-1]))
        return found[1:]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.states(images)[-1]))


def at_exit(states_ND: Tensor, head: nn.Linear, data: Data, rows: Tensor, gamma: float, form: Form) -> Tensor:
    """The mean over some rows; the head is not moved."""
    teacher_NE, labels_N = data.features_NE[rows], data.classes_N[rows]
    weight, bias = data.head.weight, data.head.bias
    asked = enhanced(teacher_NE, weight, labels_N, gamma=gamma, form=form, bias_U=bias)
    share = 1 / len(rows)
    return head_loss(
        states_ND, head.weight.detach(), labels_N, student_bias_V=head.bias.detach(),
        ce_weight_N=share * asked.ce_weight_N, kl_weight_N=share * asked.kl_weight_N,
        teacher_NE=asked.sharpness * teacher_NE, teacher_head_UE=weight,
        teacher_bias_U=asked.sharpness * bias,
    ).loss  # fmt: skip


def student_accuracy(arm: str, data: Data, seed: int) -> float:
    torch.manual_seed(seed)
    how, student = ARMS[arm], Student()
    own = nn.ModuleList()
    if isinstance(how, tuple):
        own.extend(Exit(WIDTH, 128) for _ in range(BLOCKS - 1))
    elif how is not None:
        own.append(nn.Linear(WIDTH, TEACHER_WIDTH))

    def loss_of(rows: Tensor) -> Tensor:
        *early, last_ND = student.states(data.images[rows])
        loss = kd(student.norm(last_ND), student.head, data, rows, has_teacher=arm != "no teacher")
        if isinstance(how, tuple):
            exits = zip(own, early, strict=True)
            return loss + sum(at_exit(e(s), student.head, data, rows, *how) for e, s in exits)
        if how is not None:
            loss = loss + hint_rows(own[0](early[-1]), data.features_NE[rows], "mse").mean()
        return loss

    train([*student.parameters(), *own.parameters()], loss_of, seed)
    return accuracy(student, *data.test)


def one_seed(seed: int) -> dict[str, float]:
    data = make_data(seed)
    return {"teacher": data.teacher_accuracy} | {arm: student_accuracy(arm, data, seed) for arm in ARMS}


if __name__ == "__main__":
    report(str(__doc__), one_seed, "KD")
