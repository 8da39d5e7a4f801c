"""A run goes on with its text wherever that lies now, and with no other."""

SHORT = ["--eval_every", "0", "--checkpoint_every", "10", "--sequence_length", "16"]


def test_moved_text_continues_a_run(in_process, workshop):
    text = "".join(f"line {i} of a text that moves\n" for i in range(200))
    old, new = workshop.folder / "old.txt", workshop.folder / "moved" / "new.txt"
    old.write_text(text)
    begun = in_process(*SHORT, "--data", str(old), "--steps", "26")
    assert begun.returncode == 0, begun.stderr
    new.parent.mkdir()
    old.rename(new)
    options = ["--data", str(new), "--resume", "--change_schedule", "--steps", "30"]
    moved = in_process(*SHORT, *options)
    assert moved.returncode == 0 and "after step 26" in moved.stdout, moved.stderr
    new.write_text(text.replace("line 7 ", "line 8 "))
    other = in_process(*SHORT, *options[:-1], "34")
    assert other.returncode == 2 and "the corpus is another" in other.stderr
