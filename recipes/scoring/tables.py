"""What evaluate.py prints."""


def describe(record):
    """What is evaluated on what, in two lines.

    Args:
        record: as it is written to the JSON file.
    """
    model = (
        f"{record['model']}: {record['class']}, {record['parameters']:,} parameters "
        f"({record['parameters_without_embeddings']:,} without embeddings), {record['dtype']} on "
        f"{record['device']}\n"
    )
    if "task" in record:
        settings = (f"{name} {value}" for name, value in record["task"].items() if name != "name")
        return f"{model}the task {record['task']['name']}: {', '.join(settings)}"
    text, boundary = record["text"], record["boundary"]
    held_out = "" if text["whole"] else " held out"
    return (
        f"{model}{text['source']}: {text['bytes']:,} bytes{held_out} in {text['documents']:,} "
        f"documents (sha256 {text['sha256'][:8]}), {text['tokens']:,} tokens, each document after "
        f"{boundary['token']}"
    )


def table(record):
    """The figures in lines of two columns."""
    trained = record["trained_length"] or record["declared_length"]
    rows = []
    if "bits_per_byte" in record:
        windows = f"bits per byte, windows of {record['sequence_length']}"
        rows.append((windows, _bits(record["bits_per_byte"])))
        rows.append(("  documents one by one", _bits(record["bits_per_byte_of_documents"])))
    for name, value in record.items():
        kind, _, what = name.partition("/")
        if kind == "nats_at":
            rows.append((f"nats per token at {what}", _bits(value)))
        elif kind == "bits_per_byte_in_context":
            beyond = "  longer than in training" if trained and int(what) > trained else ""
            rows.append((f"bits per byte in context {what}", _bits(value) + beyond))
        elif kind == "accuracy":
            rows.append((f"accuracy, {what or 'as trained'}", f"{value:.3f}"))
    rows += [(f"state after {n} tokens", f"{x:,} bytes") for n, x in record["state_bytes"].items()]
    for kind in ("reading", "writing"):
        if speed := record.get(f"{kind}_tokens_per_second"):
            rows.append((f"tokens per second, {kind}", f"{speed:,.0f}"))
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:{width}}{value}" for name, value in rows)


def _bits(value):
    return f"{value:.4f}"
