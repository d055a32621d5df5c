"""Bad updates, each pushed through the public way: a wish, the clock, the training child, the gate, the check of what is served.

All start from one good version of stories260K that has learned two domains of CLINC150. What is wrong with the served
artefact alone is put between the store and the check, for one candidate that is good in itself; as LoRA teaches stories260K
nothing, an adapter applied twice is the starter's.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import _report as report  # before torch: sets the app's environment
from benchmarks._stories import stories
from benchmarks._streams import domains
from benchmarks._tasks import Learnable
from clm_app.data.rows import Row, load
from clm_app.data.streams import TaskSource
from clm_app.engine.settings import TrainingSettings
from clm_app.errors import BadInput
from clm_app.judging import benchmarks
from clm_app.registry import versions
from clm_app.registry.versions import STARTER
from clm_app.settings import Settings
from clm_app.wishes import LearnWish, ask
from clm_app.workspace import Workspace
from jobs.clock import Clock
from jobs.supervisor import spawn
from store.tables import Decision, Job, Run, Version
from store.tables._columns import now

from sqlmodel import select  # isort: skip

RATE = 2e-3  # of a good update; see LOG.md, "The fast set"
BENCHED, INJECTED = 200, 30  # items of a benchmark, and how many of them stand in the training rows
WRAPS = {
    "ChatML": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "Llama 2": "<s>[INST] {} [/INST]",
    "Gemma": "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
    "Alpaca": "### Instruction:\n{}\n\n### Response:\n",
    "plain": "User:\n{}\nAssistant:\n",
}  # fmt: skip
NO_MASK = """
import sys
from pathlib import Path
from clm_app.engine import child, loop
made = loop.tensors
def empty(*given):
    batch = made(*given)
    batch["labels"][:, {first}:] = loop.IGNORED
    return batch
loop.tensors = empty
sys.exit(child.main(Path(sys.argv[1])))
"""


class Tried(NamedTuple):
    """What became of one update. how: refused (before the run), failed (in it), hold, repair, inconclusive or promote."""

    kind: str
    seed: int
    detail: str
    how: str
    sentence: str
    causes: list[str]
    is_caught: bool
    is_named: bool


class Told(NamedTuple):
    """What the product said of an update."""

    how: str
    sentence: str
    causes: list[str]
    evidence: dict

    def names(self, pattern: str) -> bool:
        """Say whether a cause is called so, or the sentence says so."""
        return bool(re.fullmatch(pattern, " ".join(self.causes[:1])) or re.search(pattern, self.sentence))


class Yard:
    """A workspace with a good version, and whatever is done to updates of it."""

    def __init__(self, root: Path, data: Path, per_label: int, base: Path | None = None) -> None:
        """base: folder of the model to start from; None: stories260K, in a copy that may be spoiled."""
        self.root, self.data, self.per_label = root, data, per_label
        self.tasks = domains(data, None, per_label, report.WORK / "rows")
        root.mkdir(parents=True, exist_ok=True)
        self.base = base or root / "base"
        if not self.base.exists():
            shutil.copytree(stories(data / "stories260K", report.WORK), self.base)
        self.workspace = Workspace(Settings(
            home=root / "home", base_model=str(self.base), threads=1, backend="transformers", tick_s=0.05,
        ))  # fmt: skip
        self.start = "v2"
        self.spoil: Callable[[list[str]], list[str]] = lambda command: command
        self.clock = Clock(self.workspace, self._spawn)
        self.clock.queue.release_the_dead()
        versions.base_version(self.workspace)

    def beside(self, name: str, base: Path) -> Yard:
        """Return another workspace under this one, over another model."""
        return Yard(self.root / name, self.data, self.per_label, base)

    def close(self) -> None:
        """Give the workspace back."""
        self.workspace.close()

    def _spawn(self, command: list[str], **named):
        return spawn(self.spoil(command), **named)

    # --- the public way -----------------------------------------------------------------------------------------------

    def learn(self, name: str, path: Path, start_from: str = "", **wish) -> Told:
        """Ask for an update, let the clock do it, and return what came of it."""
        knobs = {"learning_rate": RATE, "checkpoint_every_s": 3600} | wish.pop("training", {})
        stream, training = [TaskSource(name=name, path=str(path))], TrainingSettings(**knobs)
        wanted = LearnWish(stream=stream, start_from=start_from or self.start, training=training, **wish)
        try:
            job = ask(self.workspace, wanted, "local")
        except BadInput as refusal:
            return Told("refused", str(refusal), [], {})
        return self.done(job.id)

    def done(self, job_id: int) -> Told:
        """Let the clock do the job that waits, and return what it says of its candidate."""
        while not self._job(job_id).ended_at:
            self.clock.tick()  # an older job, of a run that was cut off, is done first
            time.sleep(0.1)
        with self.workspace.read() as session:
            job = session.get_one(Job, job_id)
            if job.status != "done":
                return Told("failed", job.error or job.stage, [], {})
            version = session.exec(
                select(Version).join(Run, Run.id == Version.run_id).where(Run.job_id == job_id)
            ).one()
            decision = session.exec(
                select(Decision).where(Decision.version_id == version.id).order_by(Decision.id.desc())
            ).first()
        told = [one["cause"] for one in decision.evidence.get("causes", ())]
        return Told(decision.verdict, decision.sentence, told, decision.evidence)

    def _job(self, job_id: int) -> Job:
        with self.workspace.read() as session:
            return session.get_one(Job, job_id)

    def good_version(self) -> None:
        """Learn the first two domains, unless that was done."""
        for number, task in enumerate(self.tasks[:2]):
            names = [one.name for one in versions.everything(self.workspace)]
            if f"v{number + 1}" not in names:
                found = self.learn(task.name, self.file(task, "good", parts(task)), f"v{number}")
                assert found.how == "promote", found.sentence

    def again(self, name: str, served: Callable[[Path, dict], dict]) -> Told:
        """Judge a candidate once more that was judged before, with another artefact in the place of the served one.

        served: (an empty folder, the served side's folders) to the folders of the spoiled one.
        """
        with self.workspace.write() as session:
            version = session.exec(select(Version).where(Version.name == name)).one()
            version.state = "candidate"
            job = session.get_one(Job, session.get_one(Run, version.run_id).job_id)
            job.status, job.ended_at, job.created_at = "asked", None, now()
            session.add(version)
            session.add(job)

        def spoil(command: list[str]) -> list[str]:
            if "clm_app.engine.parity_child" in command:
                file, folder = Path(command[-1]), self.root / "served"
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                order = json.loads(file.read_text(encoding="utf-8"))
                order["served"] = order["served"] | served(folder, order["served"])
                file.write_text(json.dumps(order), encoding="utf-8")
            return command

        self.spoil = spoil
        parity = self.workspace.settings.parity
        self.workspace.settings.parity = {"seed": time.time_ns() % 2**31}  # what was compared before is compared anew
        try:
            return self.done(job.id)
        finally:
            self.spoil, self.workspace.settings.parity = lambda command: command, parity

    def file(self, task: Learnable, what: str, rows: dict[str, list[Row]], suffix: str = "jsonl") -> Path:
        """Write rows with their parts as a person's file and return it."""
        place = self.root / "rows" / f"{task.folder.name}-{what}.{suffix}"
        place.parent.mkdir(exist_ok=True)
        told = [
            {"prompt": r.prompt, "response": r.response, "split": part} for part, found in rows.items() for r in found
        ]
        text = json.dumps(told) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in told)
        place.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
        return place

    @contextlib.contextmanager
    def kept(self, file: Path) -> Iterator[Path]:
        """Yield a file that may be spoiled, and put it back afterwards."""
        content, mode = file.read_bytes(), file.stat().st_mode
        file.chmod(0o600)
        try:
            yield file
        finally:
            file.write_bytes(content)
            file.chmod(mode)


def parts(task: Learnable) -> dict[str, list[Row]]:
    """Return the rows of a task by part."""
    return {part: load(task.file(part)) for part in ("train", "validation", "test")}


# --- ten kinds --------------------------------------------------------------------------------------------------------


def shuffled(yard: Yard, task: Learnable, seed: int) -> tuple[str, Told]:
    """Give every prompt another row's answer."""
    rng, found = random.Random(seed), {}
    for part, rows in parts(task).items():
        answers = [row.response for row in rows]
        rng.shuffle(answers)
        found[part] = [Row(prompt=row.prompt, response=answer) for row, answer in zip(rows, answers, strict=True)]
    return "every answer another row's", yard.learn(f"shuffled {seed}", yard.file(task, "shuffled", found))


def class_dropped(yard: Yard, task: Learnable, seed: int) -> tuple[str, Told]:
    """Leave one class out of the training rows that the test part asks for."""
    found = parts(task)
    label = random.Random(seed).choice(sorted({row.label for row in found["train"]}))
    found["train"] = [row for row in found["train"] if row.label != label]
    return f"without {label!r}", yard.learn(f"dropped {seed}", yard.file(task, "dropped", found))


def template_broken(yard: Yard, task: Learnable, seed: int) -> tuple[str, Told]:
    """Put another chat template around every prompt, or change the template's file under the version."""
    if seed == len(WRAPS):
        with yard.kept(yard.base / "chat_template.jinja") as file:
            file.write_text(
                file.read_text(encoding="utf-8").replace("{{ bos_token }}", "{{ bos_token }}Q: "), encoding="utf-8"
            )
            return "template file changed", yard.learn(f"template {seed}", yard.file(task, "good", parts(task)))
    name = list(WRAPS)[seed]
    found = {
        part: [Row(prompt=WRAPS[name].format(row.prompt), response=row.response) for row in rows]
        for part, rows in parts(task).items()
    }
    return f"wrapped as {name} does", yard.learn(f"template {seed}", yard.file(task, "wrapped", found))


def rate(yard: Yard, task: Learnable, seed: int) -> tuple[str, Told]:
    """Train at thirty times the learning rate."""
    knobs = {"learning_rate": 30 * RATE, "seed": seed}
    return f"{30 * RATE:g}", yard.learn(f"rate {seed}", yard.file(task, "good", parts(task)), training=knobs)


def wrong_tokenizer(yard: Yard, task: Learnable, seed: int) -> tuple[str, Told]:
    """Put another tokenizer into the base's folder: the starter's, or one in which some tokens have swapped their ids."""
    with yard.kept(yard.base / "tokenizer.json") as file:
        if seed == 0:
            shutil.copyfile(STARTER / "tokenizer.json", file)
            detail = "the starter's"
        else:
            told, rng = json.loads(file.read_text(encoding="utf-8")), random.Random(seed)
            vocabulary = told["model"]["vocab"]
            chosen = rng.sample([t for t, i in vocabulary.items() if i > 258], 2**seed)
            moved = {token: vocabulary[other] for token, other in zip(chosen, chosen[1:] + chosen[:1], strict=True)}
            told["model"]["vocab"] = vocabulary | moved
            file.write_text(json.dumps(told), encoding="utf-8")
            detail = f"{len(chosen)} of {len(vocabulary)} ids swapped"
        return detail, yard.learn(f"tokens {seed}", yard.file(task, "good", parts(task)))


def truncated(yard: Yard, task: Learnable, seed: int) -> tuple[str, Told]:
    """Cut a file in the middle: of rows, in three formats; or of weights, the base's and the version's."""
    if seed < 3:
        suffix = ("jsonl", "jsonl.gz", "json")[seed]
        file = yard.file(task, "cut", parts(task), suffix)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 + 7])
        return f"rows in a .{suffix} file", yard.learn(f"cut {seed}", file)
    version = versions.by_name(yard.workspace, "v2")
    stored = sorted(yard.workspace.objects.path(version.object).rglob("*.safetensors"))
    which = yard.base / "model.safetensors" if seed == 3 else stored[seed - 4]
    with yard.kept(which) as file:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // (seed - 1)])
        return f"weights, {which.parent.name}", yard.learn(f"cut {seed}", yard.file(task, "good", parts(task)))


def quantised(yard: Yard, task: Learnable, seed: int) -> tuple[str, Told]:
    """Serve weights that are rounded to few levels."""
    bits = (2, 3, 3, 4, 4, 5)[seed]

    def served(folder: Path, side: dict) -> dict:
        from safetensors.torch import load_file, save_file

        copy = shutil.copytree(side["adapter"], folder / "rounded", copy_function=shutil.copyfile)
        for file in copy.rglob("*.safetensors"):
            rounded = {name: _rounded(tensor, bits) for name, tensor in load_file(file).items()}
            save_file(rounded, file, {"format": "pt"})
        return {"adapter": str(copy)}

    return f"{bits} bits", yard.again(candidate(yard, "auto"), served)


def _rounded(tensor, bits: int):
    if tensor.ndim == 1:
        return tensor
    step = tensor.abs().amax(1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 0.5)
    return (tensor / step).round() * step


def contaminated(yard: Yard, task: Learnable, seed: int) -> tuple[str, Told]:
    """Train on items of the benchmark that the update is held to: as they are, with other marks, or inside longer rows."""
    found, rng = parts(task), random.Random(seed)
    items = rng.sample(found["validation"], BENCHED)
    told = [{"prompt": row.prompt, "expected": row.response, "split": "test"} for row in items]
    made = benchmarks.from_items(yard.workspace, f"Held out {seed}", told, "exact_match", {}, "local")
    how = ("{}", "{}!", "Please tell me now, as soon as you can: {}")[seed % 3]
    chosen = [row for row in items if len(row.prompt.split()) > 8 or seed % 3 < 2][:INJECTED]
    found["train"] += [Row(prompt=how.format(row.prompt), response=row.response) for row in chosen]
    found["validation"] = [row for row in found["validation"] if row not in items]
    said = yard.learn(
        f"contaminated {seed}", yard.file(task, "contaminated", found), benchmarks=[made.name], check_served=False
    )
    keys = {item.key for item in benchmarks.items_of(yard.workspace, made, "test")
            if item.prompt in {row.prompt for row in chosen}}  # fmt: skip
    line = next((line for line in said.evidence.get("old", ()) if line["task"] == benchmarks.title(made)), None)
    if line and keys <= set(line["left_out"]) and line["items"] == BENCHED - len(line["left_out"]):
        return f"{len(chosen)} of {BENCHED} items, {how!r}; {len(line['left_out'])} left out", said
    return "items that leak were judged", said._replace(causes=[])


def applied_twice(yard: Yard, task: Learnable, seed: int) -> tuple[str, Told]:
    """Serve the candidate's adapter over a base that has it already."""

    def served(folder: Path, side: dict) -> dict:
        from clm_app.serving.merge import merged

        merged(Path(side["base"]), Path(side["adapter"])).save_pretrained(folder / "merged")
        for file in Path(side["base"]).glob("*token*"):
            shutil.copyfile(file, folder / "merged" / file.name)
        shutil.copyfile(Path(side["base"]) / "chat_template.jinja", folder / "merged" / "chat_template.jinja")
        return {"base": str(folder / "merged")}

    with contextlib.closing(yard.beside("starter", STARTER)) as other:
        return "merged, and served over itself", other.again(candidate(other, "lora", seed), served)


def no_mask(yard: Yard, task: Learnable, seed: int) -> tuple[str, Told]:
    """Learn from no answer token at all: the mask is empty, or stands where nothing is predicted."""
    first = seed % 2
    yard.spoil = lambda command: (
        ["python", "-c", NO_MASK.format(first=first), command[-1]] if "clm_app.engine.child" in command else command
    )
    try:
        found = yard.learn(f"no mask {seed}", yard.file(task, "good", parts(task)), training={"seed": seed})
    finally:
        yard.spoil = lambda command: command
    return ("empty", "one column too early")[first], found


def good(yard: Yard, task: Learnable, seed: int) -> tuple[str, Told]:
    """Learn a domain as it should be learned."""
    return "nothing is wrong", yard.learn(f"good {seed}", yard.file(task, "good", parts(task)), training={"seed": seed})


def candidate(yard: Yard, which: str, seed: int = 0) -> str:
    """Return the name of a promoted candidate to be served wrongly: task adapters, or one LoRA adapter over the base."""
    number = {"auto": 0, "lora": seed % 2}[which]
    name, task = f"to be served, {which} {number}", yard.tasks[2 + number]
    knobs = {"auto": {}, "lora": {
        "strategy": "naive", "method": "lora", "start_from": "v0", "training": {"learning_rate": None},
    }}  # fmt: skip
    with yard.workspace.read() as session:
        made = session.exec(
            select(Version).join(Run, Run.id == Version.run_id).join(Job, Job.id == Run.job_id).order_by(Version.id)
        ).all()
        jobs = {
            v.name: session.get_one(Job, session.get_one(Run, v.run_id).job_id).wish["stream"][0]["name"] for v in made
        }
    known = next((version for version, task_name in jobs.items() if task_name == name), None)
    if known is None:
        told = yard.learn(name, yard.file(task, "good", parts(task)), **knobs[which])
        assert told.how == "promote", told.sentence
        return candidate(yard, which, seed)
    return known


KINDS = {  # {kind: (what is done, the cause or the words that name it)}
    "shuffled labels": (shuffled, "shuffled_labels"),
    "one class dropped": (class_dropped, r"the class .* is missing from the training rows"),
    "template broken": (template_broken, r"chat template"),
    "learning rate x 30": (rate, r"learning_rate|learning rate of .* too high"),
    "wrong tokenizer": (wrong_tokenizer, r"was made with other tokens"),
    "truncated file": (truncated, r"cut short"),
    "quantisation damage": (quantised, r"rounding"),
    "contaminated benchmark": (contaminated, r"contaminated_benchmark"),
    "adapter applied twice": (applied_twice, r"adapter_twice"),
    "empty masks": (no_mask, r"No answer token is learned from"),
}  # fmt: skip
GOOD = "good update"


def tried(
    root: Path, data: Path, seeds: list[int], per_label: int, kinds: Sequence[str], *, learned: bool = True
) -> list[Tried]:
    """Try these kinds with every seed; what is done stands in a file.

    learned: False starts from the base, for kinds that are refused before a run whatever was learned.
    """
    lines = root / "bad.jsonl"
    found = [Tried(**json.loads(line)) for line in lines.read_text().splitlines()] if lines.exists() else []
    done = {(one.kind, one.seed) for one in found}
    todo = [(kind, seed) for kind in kinds for seed in seeds if (kind, seed) not in done]
    chosen = lambda: [one for one in found if one.seed in seeds and one.kind in kinds]  # noqa: E731
    if not todo:
        return chosen()
    yard = Yard(root, data, per_label)
    try:
        yard.start = "v2" if learned else "v0"
        if learned:
            yard.good_version()
        for kind, seed in todo:
            do, pattern = KINDS.get(kind, (good, ""))
            detail, told = do(yard, yard.tasks[2 + seed], seed)
            is_caught = told.how != "promote" or (kind == "contaminated benchmark" and bool(told.causes))
            is_named = bool(pattern) and told.names(pattern)
            sentence = told.sentence.replace(f"{root}/", "")  # a path tells of one machine alone
            one = Tried(kind, seed, detail, told.how, sentence, told.causes, is_caught, is_named)
            with open(lines, "a", encoding="utf-8") as out:
                out.write(json.dumps(one._asdict()) + "\n")
            found.append(one)
            report.console.print(
                f"{kind}, {seed} ({detail}): {told.how}, {told.causes}: {told.sentence[:160]}", markup=False
            )
    finally:
        yard.close()
    return chosen()
