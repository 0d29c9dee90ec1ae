"""`zenith cache ls | show | clear`: what mode="max-autotune" has measured on this machine.

  zenith cache ls                 one line for each site: the winner, and microseconds of both
  zenith cache show attention     everything about the entries whose site holds the word
  zenith cache clear

Exit codes: 0 done; 1 `show` found nothing; 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (__doc__ or "").split("\n", 1)[1]
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("action", choices=("ls", "show", "clear"))
    parser.add_argument("word", nargs="?", default="", help="of `ls` and `show`: only entries whose site holds it")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def main(arguments: argparse.Namespace) -> int:
    from zenith_jax.compiled import tuning

    if arguments.action == "clear":
        removed = tuning.clear()
        print(json.dumps(dict(removed=removed)) if arguments.json else f"{removed} entries removed")
        return 0
    found = [e for e in tuning.entries() if arguments.word in e.key["site"]]
    as_dicts = [dataclasses.asdict(e) for e in found]
    if arguments.json:
        print(json.dumps(as_dicts, indent=1))
    elif arguments.action == "show" and not found:
        print(f"no entry in {tuning.folder()} has a site with {arguments.word!r} in it: see `zenith cache ls`")
    elif arguments.action == "show":
        print("\n\n".join("\n".join(f"{k:9} {v}" for k, v in (*d.pop("key").items(), *d.items())) for d in as_dicts))
    else:
        print(f"{len(found)} entries in {tuning.folder()}")
        if found:
            print("faster  zenith us     XLA us  site", *found, sep="\n")
    return 1 if arguments.action == "show" and not found else 0
