"""What the card of a classifier says in place of a language model's: hub_cards/classifier.md."""

import json
import re

# Field of `zoo.Architecture` -> the Hub's name of the task, and what the model does.
TASKS = {
    "sequence_classifier": ("text-classification", "classifies texts"),
    "token_classifier": ("token-classification", "classifies each token of a text"),
    "question_answerer": ("question-answering", "finds where in a text an answer lies"),
}
# A link to a paper, as [title](address); a title may go on on the next line.
PAPER = re.compile(r"\[[^\]]+\]\(https://arxiv\.org/abs/[\d.]+\)")
MODEL_SECTION = re.compile(r"## Model\n.*?(?=\n## )", re.DOTALL)


def task_of(head):
    """The Hub's name of what a head is for, the pipeline_tag of its card."""
    return TASKS[head][0]


def text_of_classifier(template, of_architecture, subject):
    """The text of a card, its placeholders still to be filled in.

    Args:
        template: of hub_cards/classifier.md.
        of_architecture: text of the card of a language model, whose decoder is described there.
        subject: a `zoo.hub.card.Subject`.
    """
    # "$$" stays a dollar when placeholders are filled in: labels and the like come from elsewhere.
    parts = {
        "@kind": TASKS[subject.head][1],
        "@labels": _labels(subject).replace("$", "$$"),
        "@paper": " ".join(PAPER.search(of_architecture)[0].split()),
        "@model": MODEL_SECTION.search(of_architecture)[0].rstrip(),
    }
    return re.sub("|".join(parts), lambda match: parts[match[0]], template)


def _labels(subject):
    """What the scores are of, as a paragraph."""
    config = subject.config
    if subject.head == "question_answerer":
        return "Its two scores of each token say how well an answer begins there, and ends there."
    is_number = config.problem_type == "regression" or config.num_labels == 1
    if subject.head == "sequence_classifier" and is_number:
        many = f"{config.num_labels} numbers" if config.num_labels > 1 else "a number"
        return f"Its output is {many}, not a class."
    several = ", of which several may hold" * (config.problem_type == "multi_label_classification")
    names = [config.id2label[index] for index in sorted(config.id2label)]
    # JSON on one line, which nothing in it can end.
    listed = json.dumps(names, ensure_ascii=False)
    count = "one label" if len(names) == 1 else f"{len(names)} labels"
    return f"It has {count}{several}:\n\n```json\n{listed}\n```"


def usage_of_classifier(subject):
    """The example of a classifier's card, in Python."""
    task, name = task_of(subject.head), json.dumps(subject.name, ensure_ascii=False)
    named = f"name = {name}  # this folder, or its Hub name"
    if subject.prompt is not None and subject.head != "question_answerer":
        raw = ', function_to_apply="none"' * (subject.config.num_labels == 1)
        return "\n".join(
            [
                "from transformers import pipeline",
                "",
                named,
                f'classify = pipeline("{task}", model=name, trust_remote_code=True{raw})',
                f"print(classify({json.dumps(subject.prompt)}))",
            ]
        )
    auto = {
        "sequence_classifier": "AutoModelForSequenceClassification",
        "token_classifier": "AutoModelForTokenClassification",
        "question_answerer": "AutoModelForQuestionAnswering",
    }[subject.head]
    lines = [
        "import torch",
        f"from transformers import {auto}" + ", AutoTokenizer" * (subject.prompt is not None),
        "",
        named,
        f"model = {auto}.from_pretrained(name, trust_remote_code=True).eval()",
    ]
    if subject.prompt is None:
        lines.append(
            'inputs = {"input_ids": torch.tensor([[1, 2, 3]])}  # it came without a tokenizer'
        )
    else:
        text = json.dumps(subject.prompt)
        lines += [
            "tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)",
            "# Question and text in one, in the order that it was trained on.",
            f'inputs = tokenizer({text}, return_tensors="pt")',
        ]
    lines += ["with torch.no_grad():", "    output = model(**inputs)"]
    if subject.head != "question_answerer":
        return "\n".join([*lines, "print(output.logits)"])
    lines += [
        "start = int(output.start_logits.argmax())",
        "end = start + int(output.end_logits[0, start:].argmax())",
    ]
    found = 'inputs["input_ids"][0, start : end + 1]'
    printed = f"tokenizer.decode({found})" if subject.prompt is not None else f"{found}.tolist()"
    return "\n".join([*lines, f"print({printed})"])
