"""Writes helm/onerec/README.md from Chart.yaml and values.yaml, as helm-docs would, and the schema's descriptions.

A value's sentence is the ``# --`` comment above its key. Run: ``make chart``.
Left out: comments of more than one line, and values inside lists.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parents[3] / "helm" / "onerec"
HEAD = """# {name}

{description}

<!-- Written by `make chart` from values.yaml; edit that instead. -->

Chart {version}, application {appVersion}, Kubernetes {kubeVersion}. From an empty cluster to a served model:
[docs/deploy.md](../../docs/deploy.md). Secrets are named, never given: the chart makes none.

```
helm install onerec helm/onerec -n onerec -f my-values.yaml
helm test onerec -n onerec
```

Examples: {examples}.
`values.schema.json` refuses unknown keys; combinations that cannot work are refused with a sentence that says what to
change.
"""


def documented(text: str) -> dict[str, str]:
    """Path of every key of a values file that has a ``# --`` comment, and its sentence."""
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    sentence = ""
    for line in text.splitlines():
        key = re.match(r"^( *)([A-Za-z][\w]*):( |$)", line)
        if comment := re.match(r"^ *# -- (.*)$", line):
            sentence = comment[1]
        elif key:
            depth = len(key[1])
            above = [each for each in above if each[0] < depth] + [(depth, key[2])]
            if sentence:
                found[".".join(name for _, name in above)] = sentence
            sentence = ""
    return found


def leaves(values: dict[str, Any], documents: dict[str, str], prefix: str = "") -> dict[str, Any]:
    """Every value by its path; a map is one value when it is documented itself, or empty."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value and path not in documents:
            found |= leaves(value, documents, f"{path}.")
        else:
            found[path] = value
    return found


def readme() -> str:
    """The whole page."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    documents = documented(text)
    examples = ", ".join(f"[{path.stem}](ci/{path.name})" for path in sorted((CHART / "ci").glob("*.yaml")))
    page = [HEAD.format(**chart, examples=examples)]
    section = None
    for path, value in leaves(yaml.safe_load(text), documents).items():
        part = path.split(".")[0] if "." in path else "general"
        if part != section:
            section = part
            page.append(f"\n## {part}\n| value | default | |\n|---|---|---|")
        page.append(f"| `{path}` | `{json.dumps(value, ensure_ascii=False)}` | {documents[path]} |")
    return "\n".join(page) + "\n"


def schema() -> str:
    """``values.schema.json`` with the values' sentences as descriptions; what is allowed is written there by hand."""
    found = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    for path, sentence in documented((CHART / "values.yaml").read_text(encoding="utf-8")).items():
        at = found
        for part in path.split("."):
            at = at.get("properties", {}).get(part, {})
        rest = {key: value for key, value in at.items() if key != "description"}
        at.clear()
        at.update({"description": sentence, **rest})
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    (CHART / "README.md").write_text(readme(), encoding="utf-8")
    (CHART / "values.schema.json").write_text(schema(), encoding="utf-8")
