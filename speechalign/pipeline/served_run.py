"""What a run, or the folder of a policy, says of the endpoint that serves it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from speechalign.artifacts import is_committed, manifest_facts
from speechalign.config.align import AlignConfig
from speechalign.config.load import load_config
from speechalign.errors import ConfigError


def args_of(path: Path, args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `args` that a policy's folder or a run says in place of a file's.

    A run's recipe names its own speech stack; of a bare policy nobody knows another than the
    file's.

    Raises:
        ConfigError: it is neither, or the run's best policy is gone.
    """
    if is_committed(path) and manifest_facts(path).get("kind") == "ar":
        return {"policies": {"policy": {"path": str(path)}}}
    if (path / "config.yaml").is_file():
        recipe = load_config(AlignConfig, path / "config.yaml")
        aligned = _best_policy(path, recipe)
        if aligned is not None:
            policies = {"base": recipe.policy, "aligned": aligned}
            return {
                **_stack_of(recipe, args),
                "policies": {name: {"path": str(one)} for name, one in policies.items()},
            }
    raise ConfigError(
        f"{path} holds no policy and is no run with a trained one; give the folder of a policy, "
        "e.g. runs/demo/iteration-1/policy, or a run, e.g. runs/demo"
    )


def _best_policy(run: Path, recipe: AlignConfig) -> Path | None:
    finished = [
        run / f"iteration-{number}" / "policy"
        for number in range(1, recipe.pipeline.iterations + 1)
    ]
    if is_committed(run / "best"):
        best = manifest_facts(run / "best")
        finished = [run / best["policy"] if best["iteration"] else recipe.policy]
        if not is_committed(finished[0]):
            raise ConfigError(f"{run} names {finished[0]} as its best policy, which is gone")
    return next((one for one in reversed(finished) if is_committed(one)), None)


def _stack_of(recipe: AlignConfig, args: Mapping[str, Any]) -> dict[str, Any]:
    """Return what turns the codes of a run's policies into sound, and whose voices they know."""
    levels = {"num_levels": recipe.rendering.num_levels}
    stack: dict[str, Any] = {
        "codec": recipe.codec.model_dump(mode="json"),
        "nar": str(recipe.nar),
        "rendering": section(args, "rendering") | levels,
    }
    voices = section(args, "voices")
    if Path(str(voices.get("golden"))).resolve() != recipe.golden.resolve():
        for names in ("speakers", "aliases"):  # of other recordings
            voices.pop(names, None)
        frames = recipe.prompts.speaker_frames
        stack["voices"] = voices | {"golden": str(recipe.golden), "speaker_frames": frames}
    return stack


def section(args: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a copy of a section of `args`; one that is empty or missing is empty.

    Raises:
        ConfigError: it is no section.
    """
    values = args.get(key) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"applications.args.{key} must hold a mapping of keys to values")
    return dict(cast("dict[str, Any]", values))
