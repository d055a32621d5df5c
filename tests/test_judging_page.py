"""What a person does about verdicts on the page: freeze a benchmark, see what leaks, approve by name, look at the evidence."""

from __future__ import annotations

import json
import subprocess
import sys

import httpx
import pytest

from tests.smallest import TASKS, make_rows
from tests.test_page import ROOT, SERVER, WAIT_S, make_base

# Before the page opens: a task, and a version that passed the gate and waits for a named person.
WAITING = '''
import json
from clm_app.data.ingest import snapshot
from clm_app.judging.gate import GateSettings, Pair, judge
from store.tables import Decision, Job, Run, Version

base = versions.base_version(workspace)
taken = snapshot(workspace, "Colours", home / "colours.jsonl", "local")
new = Pair(task="Colours", before=[0] * 40, after=[1] * 36 + [0] * 4, items=[str(i) for i in range(40)],
           loss_before=[3.0] * 40, loss_after=[0.1] * 40, bound_to={"snapshot": taken.object, "before": "b", "after": "a"})
old = Pair(task="Lamps", before=[1] * 380 + [0] * 20, after=[1] * 378 + [0] * 22, items=[f"l{i}" for i in range(400)])
verdict = judge(new, [old], GateSettings(policy="approval"))
with workspace.write() as session:
    job = Job(kind="learn", wish={"deploy": True, "stream": [{"name": "Colours"}]}, status="done")
    session.add(job)
    session.flush()
    run = Run(job_id=job.id, position=0, task_id=taken.task_id, snapshot_id=taken.id, parent_version_id=base.id,
              strategy="naive", method="lora", seed=0, folder="runs/1", status="done")
    session.add(run)
    session.flush()
    version = Version(name="v1", parent_id=base.id, run_id=run.id, kind="base", base_path=base.base_path,
                      base_digest=base.base_digest, state="waiting")
    session.add(version)
    session.flush()
    session.add(Decision(version_id=version.id, against_version_id=base.id, **verdict.model_dump()))
'''  # fmt: skip


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Address of the page of a home where v1 waits."""
    home = tmp_path_factory.mktemp("waiting")
    make_base(home / "base")
    (home / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(64, TASKS["Colours"])))
    script = SERVER.replace("\nserve(House(", f"\n{WAITING}\nserve(House(")
    process = subprocess.Popen([sys.executable, "-c", script, str(home)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    found = process.stdout.readline().strip()
    with httpx.Client(base_url=found, timeout=30) as client:
        while not client.get("/api/health").json()["page"]:
            pass
    yield found
    process.terminate()
    process.communicate(timeout=WAIT_S)


@pytest.mark.browser
def test_a_benchmark_is_frozen_on_the_page_and_says_what_leaks(address, browser):
    from playwright.sync_api import expect

    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.goto(address)
    page.get_by_role("tab", name="Benchmarks", exact=True).click()
    page.get_by_label("written here").check()
    page.locator("#clm-items-written textarea").fill("no JSON")
    page.locator("#clm-benchmark-name textarea, #clm-benchmark-name input").first.fill("Signals")
    page.locator("#clm-freeze").click()
    expect(page.locator("#clm-benchmark-answer")).to_contain_text("Line 1 is not JSON", timeout=15_000)
    trained = httpx.get(f"{address}/api/tasks/Colours/rows").json()[0]["prompt"]
    items = [{"prompt": trained, "expected": "go on"}] + [
        {"prompt": f"a question nobody trained, number {i} of {i * i}", "expected": "stop here"} for i in range(11)
    ]
    page.locator("#clm-items-written textarea").fill("\n".join(map(json.dumps, items)))
    page.locator("#clm-freeze").click()
    expect(page.locator("#clm-benchmark-answer")).to_contain_text("Signals@1 is frozen", timeout=15_000)
    expect(page.locator("#clm-benchmark-answer")).to_contain_text("1 item of them stand in training rows")
    expect(page.locator("#clm-benchmarks")).to_contain_text("1 leak", timeout=15_000)
    page.locator("#clm-examine").click()
    expect(page.locator("#clm-examine-answer")).to_contain_text("live before Signals@1", timeout=15_000)
    page.get_by_role("tab", name="Compare", exact=True).click()
    expect(page.locator("#clm-standing")).to_contain_text("Every version", timeout=15_000)
    page.close()


@pytest.mark.browser
def test_a_waiting_version_shows_its_evidence_and_goes_live_with_a_name(address, browser):
    from playwright.sync_api import expect

    page, problems = browser.new_page(viewport={"width": 1280, "height": 1000}), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    page.get_by_role("tab", name="Models", exact=True).click()
    page.locator('[data-version="v1"]').click()
    shown = page.locator("#clm-verdict")
    expect(shown).to_contain_text("Promoted: it learned Colours", timeout=15_000)
    expect(shown).to_contain_text("Lower bound")
    expect(page.locator("#clm-voices")).to_contain_text("waits for approval by name", timeout=15_000)
    page.locator("#clm-approve").click()
    expect(page.locator("#clm-say-answer")).to_contain_text("Who says so?", timeout=15_000)
    page.locator("#clm-by textarea, #clm-by input").first.fill("Bea")
    page.locator("#clm-approve").click()
    expect(page.locator("#clm-say-answer")).to_contain_text("v1 is accepted; v1 is live", timeout=15_000)
    expect(page.locator(".clm-header")).to_contain_text("live: v1", timeout=15_000)
    expect(page.locator("#clm-approve")).to_be_hidden(timeout=15_000)
    assert httpx.get(f"{address}/api/deployments").json()[0]["actor"] == "Bea" and not problems
    page.close()
