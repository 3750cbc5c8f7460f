"""`oppu users` and `oppu token`: the vault on the command line. Parse, call the vault, print; no rules of its own.

In: arguments. Out: a table for people, or with `--json` one document for programs. `--vault` names a run's folder, its
YAML file, or a vault's folder. A reader might question that `list` shows hashes: a vault does not know its users' ids;
they are shown where the run's index has them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oppu_ray.config import Config, PrivacyConfig, from_dict, load_config, located
from oppu_ray.files import write_atomic

if TYPE_CHECKING:
    from oppu_ray.forget import Receipt
    from oppu_ray.vault import Manifest, Vault


@dataclass(frozen=True)
class Place:
    """Where a command works: a vault, and the run that it belongs to, if any."""

    vault: Vault
    config: Config | None

    @property
    def folders(self) -> list[Path]:
        """Folders outside the vault that may speak of users."""
        return [Path(self.config.run_dir)] if self.config and Path(self.config.run_dir).is_dir() else []


@dataclass(frozen=True)
class Shown:
    """What a command has to say: to programs, to people, and as exit code (1: something was found wrong)."""

    data: Any
    text: str
    code: int = 0


Command = Callable[[Place, argparse.Namespace], Shown]


def add_parsers(commands: Any) -> None:
    """Put `users` and `token` among the subcommands of `oppu`."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--vault", metavar="WHERE", help="run folder, its YAML, or vault folder (default: $OPPU_VAULT)")
    common.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    maybe = argparse.ArgumentParser(add_help=False, parents=[common])
    maybe.add_argument("--hash", action="store_true", help="the user is given as (the first digits of) their hash")
    one = argparse.ArgumentParser(add_help=False, parents=[maybe])
    one.add_argument("user", help="the user's id")
    scan = argparse.ArgumentParser(add_help=False)
    scan.add_argument("--scan", type=Path, action="append", default=[], metavar="FOLDER", help="beside vault and run")

    users = commands.add_parser("users", help="the people in a vault: list, show, export, forget, ...")
    verbs = users.add_subparsers(dest="verb", required=True)

    def verb(name: str, text: str, run: Command, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text, parents=list(parents))
        parser.set_defaults(run=run)
        return parser

    verb("list", "all users", _list, common)
    verb("show", "what the vault holds of a user", _show, one)
    verb("add", "register users", _add, common).add_argument("users", nargs="+", metavar="USER")
    history = verbs.add_parser("history", help="a user's history").add_subparsers(dest="action", required=True)
    add = history.add_parser("add", help="add items: one JSON object a line", parents=[one])
    add.add_argument("file", type=Path, help=".jsonl or .jsonl.gz, items as in a run's data")
    add.set_defaults(run=_history_add)
    verb("export", "everything of a user in one file", _export, one).add_argument("file", type=Path)
    add = verb("import", "make a user from an exported file", _import, one)
    add.add_argument("file", type=Path)
    add.add_argument("--base", metavar="FINGERPRINT", help="of the base here, where no run and no other user tells it")
    forget = verb("forget", "remove a user, or some items, everywhere; cannot be undone", _forget, one, scan)
    forget.add_argument("--item", action="append", default=[], metavar="ID", help="only this item (may be repeated)")
    forget.add_argument("--no-train", action="store_true", help="with --item: do not train the user again now")
    forget.add_argument("--receipt", type=Path, metavar="FILE", help="write the signed receipt there too")
    forget.add_argument("--yes", action="store_true", help="do not ask")
    verb("versions", "a user's adapters and what they were made from", _versions, one)
    verb("use", "make a version current", _use, one).add_argument("version")
    verb("rollback", "make the good version before the current one current", _rollback, one)
    diff = verb("diff", "what changed from one version to another", _diff, one)
    diff.add_argument("old")
    diff.add_argument("new")
    verify = verb("verify", "read everything and check it against its checksums", _verify, maybe)
    verify.add_argument("user", nargs="?", help="only this user")
    sweep = verb("gc", "sweep what crashes left behind", _gc, common)
    sweep.add_argument("--min-age", type=float, default=3600.0, metavar="S", help="only what is older (default 3600)")
    proof = verb("verify-receipt", "prove by a scan that what was forgotten is gone", _verify_receipt, common, scan)
    proof.add_argument("receipt", help="file, or id of a receipt that the vault keeps")
    proof.add_argument("--texts", type=Path, metavar="FILE", help="texts that must be nowhere, one a line")

    verbs = commands.add_parser("token", help="bearer tokens for the service").add_subparsers(
        dest="verb", required=True
    )
    create = verb("create", "a new token; it is shown once", _token_create, maybe)
    create.add_argument("user", nargs="?", help="the user it speaks for")
    create.add_argument("--role", default="user", help="user (default), operator or reader")
    create.add_argument("--days", type=float, help="how long it is valid; default for ever")
    verb("list", "all tokens, without their secrets", _token_list, common)
    verb("revoke", "end a token", _token_revoke, common).add_argument("token_id")


def main(options: argparse.Namespace) -> int:
    """Run one parsed command. Returns 0, or 1 when something was found wrong; ValueError for bad input."""
    place = open_place(options.vault or os.environ.get("OPPU_VAULT", ""), options.run is _import)
    with closing(place.vault):
        try:
            shown: Shown = options.run(place, options)
        except OSError as error:  # of a file that was named on the command line; the vault reports its own
            raise ValueError(f"{error.filename}: {error.strerror}") from error
    print(json.dumps(shown.data, indent=1) if options.json else shown.text)
    return shown.code


def open_place(where: str, may_create: bool = False) -> Place:
    """The vault that a run's folder, a YAML file or a vault's own folder names.

    Raises:
        ValueError: It names none, or (unless it may be made) there is none yet.
    """
    from oppu_ray.vault import Vault, open_vault

    if not where:
        raise ValueError("which vault? give --vault (a run's folder, its YAML or a vault's folder) or set OPPU_VAULT")
    path = Path(where).expanduser()
    if path.suffix in (".yaml", ".yml"):
        config: Config | None = located(load_config(path))
    else:
        config = _config_of_run(path) or (_config_of_run(path.parent) if path.name == "vault" else None)
    root = Path(config.vault.path or Path(config.run_dir) / "vault").expanduser() if config else path
    if not (root / "key").is_file():
        is_free = config or not path.exists() or (path.is_dir() and not any(path.iterdir()))
        if not (may_create and is_free):
            raise ValueError(f"{where}: no vault in {root}; expected a run's folder, its YAML, or a vault's folder")
    return Place(open_vault(config, may_create) if config else Vault(root, create=may_create), config)


def _config_of_run(folder: Path) -> Config | None:
    """The config by which a run was made, at the place where the run is now; None if this is no run's folder."""
    for stage in ("train", "adapt", "prepare"):
        result = folder / stage / "result.json"
        if result.is_file():
            return replace(from_dict(json.loads(result.read_text())["config"]), run_dir=str(folder))
    return None


# ---- looking


def _list(place: Place, _options: argparse.Namespace) -> Shown:
    ids = _ids(place)
    rows = [
        {
            "user": ids.get(user.user_hash),
            "hash": user.user_hash,
            "current": user.current,
            "num_versions": user.num_versions,
            "created": _time(user.created_at),
        }
        for user in place.vault.registry.users()
    ]
    return Shown(rows, _table([{**row, "hash": str(row["hash"])[:12]} for row in rows], f"{len(rows)} users"))


def _show(place: Place, options: argparse.Namespace) -> Shown:
    vault, user = place.vault, _known(place, options)
    current = vault.registry.current(user)
    versions = vault.registry.versions(user)
    fields = {
        "hash": str(user),
        "folder": str(vault.user_folder(user)),
        "is_sealed": vault.is_encrypted,
        "current": current.version if current else None,
        "num_versions": len(versions),
        "quarantined": [row.version for row in versions if not row.is_good],
        "num_items": len(vault.read_history(user)),
        "files": vault.blob_names(user),
        "num_tokens": sum(token.revoked_at is None for token in vault.registry.tokens(user)),
        "receipts": [json.loads(body)["receipt_id"] for body in vault.registry.receipts(user)],
    }
    return Shown(fields, "\n".join(f"{name:13} {_cell(value)}" for name, value in fields.items()))


def _versions(place: Place, options: argparse.Namespace) -> Shown:
    from oppu_ray.privacy import epsilon_of

    vault, user = place.vault, _known(place, options)
    current = vault.registry.current(user)
    rows, table = [], []
    for row in vault.registry.versions(user):
        manifest: Manifest | None = None
        if row.is_good:
            try:
                manifest = vault.read_manifest(vault.user_folder(user) / "adapters" / row.version, row)
            except ValueError as error:  # damaged, or not to be read now
                print(f"oppu: version {row.version}: {error}", file=sys.stderr)
        is_current = current is not None and row.version == current.version
        rows.append({**asdict(row), "is_current": is_current, "manifest": asdict(manifest) if manifest else None})
        table.append(
            {
                "version": row.version,
                "": "current" if is_current else "" if manifest else "bad",
                "trained": _time(row.created_at),
                "run": row.run_id,
                "base": row.base_fingerprint[:12],
                "task": manifest.task_fingerprint if manifest else "",
                "items": len(manifest.item_ids) if manifest else "",
                "seed": manifest.seed if manifest else "",
                "loss": _metric(manifest, "last_loss", ".4f"),
                "epsilon": _metric(manifest, "epsilon", ".2f"),
            }
        )
    summary = f"{len(rows)} versions"
    if rho := vault.registry.rho(user):
        delta = (place.config.privacy if place.config else PrivacyConfig()).delta
        spent = epsilon_of(rho, delta)
        summary += f"; all that were ever trained under noise have epsilon {spent:.2f} at delta {delta:g}"
    return Shown(rows, _table(table, summary))


def _diff(place: Place, options: argparse.Namespace) -> Shown:
    difference = place.vault.diff(_known(place, options), options.old, options.new)
    changed = {name: change for name, change in difference.tensors.items() if change}
    lines = []
    for name, (old, new) in difference.fields.items():
        if name == "item_ids":
            lines.append(f"items: {len(set(new) - set(old))} added, {len(set(old) - set(new))} gone, {len(new)} now")
        elif name in ("checksums", "shapes"):
            lines.append(f"{name} differ")
        else:
            lines.append(f"{name}: {_cell(old)} -> {_cell(new)}")
    most = sorted(changed, key=lambda name: -changed[name])[:5]
    lines.append(f"{len(changed)} of {len(difference.tensors)} tensors changed" + (", most:" if most else ""))
    return Shown(asdict(difference), "\n".join([*lines, *(f"  {changed[name]:.3g}  {name}" for name in most)]))


def _verify(place: Place, options: argparse.Namespace) -> Shown:
    problems = place.vault.verify(_known(place, options) if options.user else None)
    return Shown(problems, "\n".join(problems) or "everything is as it was written", 1 if problems else 0)


# ---- changing


def _add(place: Place, options: argparse.Namespace) -> Shown:
    added = place.vault.add_users(options.users)
    return Shown({"num_added": added}, f"{added} added, {len(options.users) - added} known before")


def _history_add(place: Place, options: argparse.Namespace) -> Shown:
    from oppu_ray.history import read_items
    from oppu_ray.tasks import get_task

    if place.config is None:
        raise ValueError(
            f"{place.vault.root}: no run here says what an item is; give --vault a run's folder or its YAML"
        )
    items = read_items(options.file, get_task(place.config.task))
    num_items = place.vault.append_history(_known(place, options), items)
    return Shown({"num_added": len(items), "num_items": num_items}, f"{len(items)} items added, {num_items} now")


def _export(place: Place, options: argparse.Namespace) -> Shown:
    from oppu_ray.archive import export_user

    export_user(place.vault, _known(place, options), options.file)
    return Shown({"path": str(options.file)}, f"{options.file}: history, files and current adapter (PEFT format)")


def _import(place: Place, options: argparse.Namespace) -> Shown:
    from oppu_ray.archive import import_user

    user = place.vault.user_hash(options.user)
    version = import_user(place.vault, user, options.file, base_fingerprint=options.base or _base_here(place))
    return Shown({"hash": user, "version": version}, f"user {user[:12]} imported, adapter version {version}")


def _use(place: Place, options: argparse.Namespace) -> Shown:
    place.vault.use(_known(place, options), options.version)
    return Shown({"current": options.version}, f"{options.version} is current")


def _rollback(place: Place, options: argparse.Namespace) -> Shown:
    version = place.vault.rollback(_known(place, options))
    return Shown({"current": version}, f"{version} is current")


def _gc(place: Place, options: argparse.Namespace) -> Shown:
    removed = place.vault.gc(options.min_age)
    return Shown(removed, "\n".join([*removed, f"{len(removed)} leftovers removed"]))


def _forget(place: Place, options: argparse.Namespace) -> Shown:
    from oppu_ray.forget import forget_items, forget_user

    vault, folders = place.vault, _to_scan(place, options)
    user = _by_hash(place, options.user) if options.hash else options.user
    what = f"{len(options.item)} item(s) of {options.user!r}" if options.item else f"all of {options.user!r}"
    if options.receipt and (options.receipt.exists() or not options.receipt.parent.is_dir()):
        raise ValueError(f"--receipt {options.receipt}: expected a new file in a folder that is there")
    _confirm(f"remove {what} from {', '.join(map(str, [vault.root, *folders]))}", options.yes)
    with_base = [run for run in place.folders if (run / "adapt").exists()]
    if options.item:
        receipt = forget_items(vault, user, options.item, folders)
    else:
        receipt = forget_user(vault, user, folders)
    if options.receipt:
        write_atomic(options.receipt, json.dumps(asdict(receipt), indent=1).encode())
    lines = [
        f"{what} forgotten: {len(receipt.removed)} files removed or rewritten, receipt {receipt.receipt_id}",
        _consequence([run for run in with_base if not (run / "adapt").exists()]),
        *_told(receipt),
    ]
    version = None
    if receipt.needs_training and not options.no_train:
        version, line = _train_again(place, user)
        lines.append(line)
    return Shown({**asdict(receipt), "new_version": version}, "\n".join(lines))


def _consequence(runs: list[Path]) -> str:
    """What the forgetting means to others; `runs` lost their task base by it."""
    if runs:
        return f"they were a base user of {runs[0]}: its task base is gone; run `adapt` and `train` again"
    return "no other user's adapter depended on this: each is trained on its own user's items only"


def _told(receipt: Receipt) -> list[str]:
    """Which running processes have dropped the user, and which have not said so."""
    num_processes = sum(one.startswith("process ") for one in receipt.checked)
    lines = [f"{num_processes} running processes have dropped what they held of it"] if num_processes else []
    if receipt.silent:
        lines.append(f"NOT ANSWERED: {', '.join(receipt.silent)}; verify the receipt later, or end these processes")
    return lines


def _train_again(place: Place, user: str) -> tuple[str | None, str]:
    """The version that a user has after some of their items were forgotten, and what to say of it."""
    if not place.vault.read_history(user):
        return None, "no items are left to train on: the user has no adapter now"
    if place.config is None:
        return None, "the adapters that had seen it are gone; name the run (--vault RUN) to train the user again"
    from oppu_ray.core import InputError
    from oppu_ray.refresh import open_task_base, refresh_user

    try:
        done = refresh_user(place.config, place.vault, user, open_task_base(place.config))
    except InputError as error:  # such as privacy.max_epsilon
        return None, f"the adapters that had seen it are gone; not trained again: {error}"
    if done.error:
        raise ValueError(f"forgotten, but the training without it failed: {done.error}")
    cost = f", epsilon {done.epsilon:.2f} over all versions" if done.epsilon else ""
    return done.version, f"trained again without it: version {done.version} is current{cost}"


def _verify_receipt(place: Place, options: argparse.Namespace) -> Shown:
    from oppu_ray.forget import BEYOND, read_receipt, verify_receipt

    if Path(options.receipt).is_file():
        text = Path(options.receipt).read_text()
    else:
        kept = {json.loads(body)["receipt_id"]: body for body in place.vault.registry.receipts()}
        if options.receipt not in kept:
            raise ValueError(f"receipt {options.receipt!r}: no such file, and no such receipt in this vault")
        text = kept[options.receipt]
    texts = [line for line in options.texts.read_text().splitlines() if line] if options.texts else []
    folders = _to_scan(place, options)
    problems = verify_receipt(place.vault, read_receipt(text), folders, texts)
    where = ", ".join(map(str, [place.vault.root, *folders]))
    lines = problems or [f"proven: nothing is left in {where}"]
    lines.append(f"not checked: {', '.join(BEYOND)}")
    return Shown(problems, "\n".join(lines), 1 if problems else 0)


def _token_create(place: Place, options: argparse.Namespace) -> Shown:
    user = _known(place, options) if options.user else None
    token = place.vault.registry.create_token(options.role, user, options.days and options.days * 86400)
    return Shown({"token": token}, token)


def _token_list(place: Place, _options: argparse.Namespace) -> Shown:
    ids = _ids(place)
    rows = [asdict(token) for token in place.vault.registry.tokens()]
    table = [
        {
            "token": row["token_id"],
            "role": row["role"],
            "user": ids.get(row["user_hash"], (row["user_hash"] or "")[:12]),
            "created": _time(row["created_at"]),
            "expires": _time(row["expires_at"]),
            "revoked": _time(row["revoked_at"]),
        }
        for row in rows
    ]
    return Shown(rows, _table(table, f"{len(rows)} tokens"))


def _token_revoke(place: Place, options: argparse.Namespace) -> Shown:
    place.vault.registry.revoke_token(options.token_id)
    return Shown({"revoked": options.token_id}, f"{options.token_id} is revoked")


# ---- who, where, how it looks


def _known(place: Place, options: argparse.Namespace) -> Any:
    """The hash of a user who must be in the vault."""
    user = _by_hash(place, options.user) if options.hash else place.vault.user_hash(options.user)
    if not place.vault.registry.has_user(user):
        raise ValueError(f"user {options.user!r}: no such user in {place.vault.root}")
    return user


def _by_hash(place: Place, digits: str) -> Any:
    from oppu_ray.registry import UserHash

    if len(digits) == 64:  # of whoever was here, as after a crash in the middle of forgetting them
        return UserHash(digits)
    found = place.vault.registry.find_users(digits)
    if len(found) != 1:
        raise ValueError(f"hash {digits!r}: fits {len(found)} users in {place.vault.root}, expected one")
    return found[0]


def _ids(place: Place) -> dict[str, str]:
    """Hash -> id of the users in the run's index."""
    from oppu_ray.prepared import INDEX_NAME, read_index

    found = {}
    for folder in place.folders:
        for user_id in read_index(folder / "prepare").entries if (folder / "prepare" / INDEX_NAME).exists() else ():
            try:
                found[str(place.vault.user_hash(user_id))] = user_id
            except ValueError:  # a run may list an id that no vault takes; such a user failed with that reason
                continue
    return found


def _base_here(place: Place) -> str | None:
    """The fingerprint of the base that adapters here stand on: the run's task base, or the newest adapter's base."""
    for folder in place.folders:
        result = folder / "adapt" / "result.json"
        if result.is_file():
            return str(json.loads(result.read_text())["fingerprints"]["task_base"])
    newest = place.vault.registry.newest_version()
    return newest.base_fingerprint if newest else None


def _to_scan(place: Place, options: argparse.Namespace) -> list[Path]:
    for folder in options.scan:
        if not folder.is_dir():
            raise ValueError(f"--scan {folder}: expected a folder")
    return [*place.folders, *options.scan]


def _confirm(what: str, is_sure: bool) -> None:
    if is_sure:
        return
    if not sys.stdin.isatty():
        raise ValueError(f"would {what}; this cannot be undone: add --yes")
    if input(f"{what}? This cannot be undone. [y/N] ").strip().lower() != "y":
        raise ValueError("nothing was removed")


def _time(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _metric(manifest: Manifest | None, name: str, form: str) -> str:
    return format(manifest.metrics[name], form) if manifest and name in manifest.metrics else ""


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None or value == "" else str(value)


def _table(rows: list[dict[str, Any]], summary: str) -> str:
    """Rows in aligned columns under their names, and a line that sums them up."""
    lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)] if rows else []
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*shown, summary])
