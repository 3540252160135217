"""Tiny files in the real layouts of the benchmarks, for tests: every name below one data root."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def write_lines(path: Path, rows: Iterable[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def picture(shade: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (shade, 30, 200 - shade)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_picture(path: Path, shade: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(shade))


def write_vqav2(root: Path) -> None:
    rows = [
        {"question_id": k, "image": f"COCO_test2015_{k:012d}.jpg", "text": f"Q{k}?{SHORT}", "category": "d"}
        for k in (11, 12, 13)
    ]
    write_lines(root / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", rows[:2])
    write_lines(root / "vqav2/llava_vqav2_mscoco_test2015.jsonl", [rows[2], *rows[:2]])
    for k in (11, 12):
        write_picture(root / f"vqav2/test2015/COCO_test2015_{k:012d}.jpg")


def write_vqav2_val(root: Path, *, answer_ids: bool = True) -> None:
    """Three questions: mixed answers, ten like ones, and a number."""
    answers = [["two"] * 3 + ["2"] * 3 + ["3"] * 4, ["yes"] * 10, ["a red bus"] * 9 + ["bus"]]
    questions = [{"question_id": 262148000 + k, "image_id": 262148, "question": f"Q{k}?"} for k in range(3)]
    annotations = [
        {
            "question_id": 262148000 + k,
            "image_id": 262148,
            "question_type": "what",
            "answer_type": ("number", "yes/no", "other")[k],
            "multiple_choice_answer": texts[0],
            "answers": [
                {"answer": text, "answer_confidence": "yes"} | ({"answer_id": i} if answer_ids else {})
                for i, text in enumerate(texts, start=1)
            ],
        }
        for k, texts in enumerate(answers)
    ]
    write_json(root / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write_json(root / "vqav2/v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    write_picture(root / "vqav2/val2014/COCO_val2014_000000262148.jpg")


def write_gqa(root: Path) -> None:
    rows = [{"question_id": f"20{k}", "image": f"n{k}.jpg", "text": f"Q{k}?{SHORT}"} for k in range(3)]
    write_lines(root / "gqa/llava_gqa_testdev_balanced.jsonl", rows)
    kinds = ("query", "verify", "choose")
    write_json(
        root / "gqa/testdev_balanced_questions.json",
        {
            f"20{k}": {
                "question": f"Q{k}?",
                "answer": ("dining table", "yes", "left")[k],
                "imageId": f"n{k}",
                "isBalanced": True,
                "types": {"structural": kinds[k], "semantic": "obj", "detailed": "x"},
            }
            for k in range(3)
        },
    )
    for k in range(3):
        write_picture(root / f"gqa/images/n{k}.jpg")


def write_vizwiz(root: Path) -> None:
    rows = [
        {"question_id": f"VizWiz_test_{k:08d}.jpg", "image": f"VizWiz_test_{k:08d}.jpg", "text": f"Q{k}?"}
        for k in range(2)
    ]
    write_lines(root / "vizwiz/llava_test.jsonl", rows)
    answers = [["unanswerable"] * 6 + ["coke"] * 4, ["Blue"] * 7 + ["blue"] * 3]
    write_json(
        root / "vizwiz/val.json",
        [
            {
                "image": f"VizWiz_val_{k:08d}.jpg",
                "question": f"Q{k}?",
                "answers": [{"answer": text, "answer_confidence": "yes"} for text in texts],
                "answer_type": ("unanswerable", "other")[k],
                "answerable": k,
            }
            for k, texts in enumerate(answers)
        ],
    )
    for k in range(2):
        write_picture(root / f"vizwiz/test/VizWiz_test_{k:08d}.jpg")
        write_picture(root / f"vizwiz/val/VizWiz_val_{k:08d}.jpg")


def write_scienceqa(root: Path) -> None:
    """Question 1 and 3 with an image, 2 without; 4 is in the split and in no question file."""
    body = "Context: N/A\nQuestion{}?\nOptions: (A) x (B) y"
    rows = []
    for k in (1, 2, 3):
        image = {"image": f"{k}/image.png"} if k != 2 else {}
        value = ("<image>\n" if image else "") + body.format(k)
        turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "The answer is A."}]
        rows.append({"id": str(k), "conversations": turns, **image})
    write_json(root / "scienceqa/llava_test_CQM-A.json", rows)
    problem = {"question": "?", "choices": ["x", "y"], "hint": "", "image": None}
    write_json(root / "scienceqa/problems.json", {str(k): problem | {"answer": k % 2} for k in (1, 2, 3, 4)})
    write_json(root / "scienceqa/pid_splits.json", {"test": ["1", "2", "3", "4"]})
    for k in (1, 3):
        write_picture(root / f"scienceqa/images/test/{k}/image.png")


def write_textvqa(root: Path) -> None:
    """Two questions on one image, which share its id in LLaVA's file, and one on another."""
    asked = [("im1", "What brand?"), ("im1", "What year?"), ("im2", "What brand?")]
    ocr = ("\nReference OCR token: DAKOTA, DIGITAL", "", "\nReference OCR token: 1999")
    write_lines(
        root / "textvqa/llava_textvqa_val_v051_ocr.jsonl",
        [
            {"question_id": image, "image": f"{image}.jpg", "text": f"{question}{ocr[k]}{SHORT}"}
            for k, (image, question) in enumerate(asked)
        ],
    )
    answers = [["dakota"] * 8 + ["Dakota digital"] * 2, ["1,999"] * 10, ["mcdonald's"] * 3 + ["x"] * 7]
    data = [
        {"question_id": 34602 + k, "image_id": image, "question": question.upper(), "answers": answers[k]}
        for k, (image, question) in enumerate(asked)
    ]
    write_json(root / "textvqa/TextVQA_0.5.1_val.json", {"data": data})
    for image in ("im1", "im2"):
        write_picture(root / f"textvqa/train_images/{image}.jpg")


def write_mme(root: Path) -> None:
    """Task "existence" flat, task "OCR" in folders, "code_reasoning" with a double space in its question."""
    release = root / "MME/MME_Benchmark_release_version"
    rows = []
    for task, texts in (
        ("existence", "{}.txt"),
        ("OCR", "questions_answers_YN/{}.txt"),
        ("code_reasoning", "{}.txt"),
    ):
        images = "images/" if task == "OCR" else ""
        for k in (1, 2):
            gap = "  " if task == "code_reasoning" else " "
            lines = [
                f"Is {k}{word}?{gap}Please answer yes or no.\t{truth}\n"
                for word, truth in (("a", "Yes"), ("b", "No"))
            ]
            path = release / task / texts.format(f"{k:04d}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines))
            write_picture(release / task / f"{images}{k:04d}.jpg")
            name = f"{task}/{k:04d}.jpg"
            rows += [
                {"question_id": name, "image": name, "text": f"Is {k}{word}?{SHORT}", "category": task}
                for word in "ab"
            ]
    write_lines(root / "MME/llava_mme.jsonl", rows)


MMBENCH_COLUMNS = (
    "index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source",
    "l2-category", "comment", "split",
)  # fmt: skip


def write_mmbench(
    root: Path, file: str = "mmbench/MMBench_DEV_EN_legacy.tsv", *, answers: bool = True
) -> None:
    """Question 1 with a rotation and a hint, 2 with two options, 3 with a literal "None" third option."""
    image = base64.b64encode(picture()).decode()
    rows = [
        ("1", "What is it?", "Look\tclosely", "cat", "dog", "owl", "fox", "B", "animals", image),
        ("1000001", "What is it?", "Look\tclosely", "dog", "owl", "fox", "cat", "A", "animals", "1"),
        ("2", "Is it?", "", "yes", "no", "", "", "A", "logic", image),
        ("3", "Which?", "", "one", "two", "None", "four", "B", "logic", image),
    ]
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    with (root / file).open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t")
        writer.writerow(MMBENCH_COLUMNS if answers else [c for c in MMBENCH_COLUMNS if c != "answer"])
        for row in rows:
            cells = [*row, "src", "l2", "", "dev"]
            writer.writerow(cells if answers else [*cells[:7], *cells[8:]])


def write_pope(root: Path, *, per_category: int = 4) -> None:
    rows, number = [], 0
    for c, category in enumerate(("random", "popular", "adversarial")):
        labels = []
        for k in range(per_category):
            number += 1
            image, text = f"COCO_val2014_{c * 10 + k // 2:012d}.jpg", f"Is there a thing{k} in the image?"
            label = ("yes", "no")[k % 2]
            labels.append({"question_id": k + 1, "image": image, "text": text, "label": label})
            rows.append({"question_id": number, "image": image, "text": text + SHORT, "category": category})
            write_picture(root / "pope/val2014" / image)
        write_lines(root / f"pope/coco/coco_pope_{category}.json", labels)
    write_lines(root / "pope/llava_pope_test.jsonl", rows)


def write_mmmu(root: Path) -> None:
    """A multiple-choice and an open question with an image, and one with several, which carries none here."""
    options = {"A": "zinc", "B": "iron oxide", "C": "copper"}
    prompt = f"What? \n(A) zinc\n(B) iron oxide\n(C) copper\n{LETTER}"
    choice = {"question_type": "multiple-choice", "all_choices": list(options), "index2ans": options}
    rows = [
        {"id": "validation_Art_Theory_1", "prompt": prompt, "image": "a1.png", **choice},
        {
            "id": "validation_Music_2",
            "prompt": f"How much?\n{SHORT}",
            "image": "m2.png",
            "question_type": "short-answer",
        },
        {"id": "validation_Music_3", "prompt": prompt, **choice},
    ]
    write_json(root / "MMMU/anns_for_eval.json", rows)
    golds = {
        "validation_Art_Theory_1": {"question_type": "multiple-choice", "ground_truth": "B"},
        "validation_Music_2": {"question_type": "short-answer", "ground_truth": ["0.96", "96"]},
        "validation_Music_3": {"question_type": "multiple-choice", "ground_truth": "C"},
    }
    write_json(root / "MMMU/answer_dict_val.json", golds)
    for name in ("a1.png", "m2.png"):
        write_picture(root / "MMMU/all_images" / name)


def write_seed_bench(root: Path) -> None:
    """Two questions about images of two kinds, and one about a video, which is not asked."""
    kinds = {"Scene Understanding": 1, "Instances Counting": 5, "Action Recognition": 10}
    rows = [("101669", "image", 5, "A"), ("2", "image", 1, "C"), ("v8_1", "video", 10, "B")]
    annotated = [
        {"question_id": name, "data_type": data, "question_type_id": kind, "answer": answer}
        for name, data, kind, answer in rows
    ]
    path = root / "seed_bench/SEED-Bench.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"questions": annotated, "question_type": kinds}))
    lines = []
    for name, data, _, _ in rows:
        image = f"SEED-Bench-{data}/{name}"
        write_picture(root / "seed_bench" / f"{image}.png")
        text = f"How many?\nA. One\nB. Two\nC. Three\nD. Four{LETTER}"
        question_id = name if data == "video" else int(name)
        lines.append({"question_id": question_id, "image": f"{image}.png", "text": text, "category": data})
    write_lines(root / "seed_bench/llava-seed-bench.jsonl", lines)


def write_all(root: Path) -> Path:
    """Every benchmark and every other split."""
    for write in (
        write_vqav2, write_vqav2_val, write_gqa, write_vizwiz, write_scienceqa, write_textvqa, write_mme,
        write_mmbench, write_pope, write_mmmu, write_seed_bench,
    ):  # fmt: skip
        write(root)
    write_mmbench(root, "mmbench_cn/MMBench_DEV_CN_legacy.tsv")
    write_mmbench(root, "mmbench/MMBench_TEST_EN_legacy.tsv", answers=False)
    write_mmbench(root, "mmbench_cn/MMBench_TEST_CN_legacy.tsv", answers=False)
    return root
