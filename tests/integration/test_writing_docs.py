"""The snippets of docs/writing.md run as they are printed, and write what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from outbox_relay.operate import migrate

if TYPE_CHECKING:
    from tests.fixtures.shop import Shop

ROOT = Path(__file__).parents[2]
WRITING = (ROOT / "docs" / "writing.md").read_text(encoding="utf-8")

SQLALCHEMY_MODELS = """
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

class Base(DeclarativeBase):
    pass

class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    total: Mapped[int]
"""

DJANGO_MODELS = """
from django.db import models

class Order(models.Model):
    id = models.BigIntegerField(primary_key=True)
    total = models.DecimalField(max_digits=10, decimal_places=2)

    class Meta:
        app_label = "shop"
        db_table = "orders"
"""

DJANGO_SETTINGS = """
import django
from django.conf import settings
settings.configure(
    INSTALLED_APPS=["shop"],
    DATABASES={{"default": {{
        "ENGINE": "django.db.backends.postgresql",
        "NAME": {name!r}, "USER": {user!r}, "HOST": "127.0.0.1", "PORT": {port},
    }}}},
)
django.setup()
"""


def section(title: str) -> str:
    return WRITING.split(f"## {title}\n")[1].split("\n## ")[0]


def snippets(title: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", section(title), re.MULTILINE | re.DOTALL)


def run(snippet: str, *, prelude: str, directory: Path, models: str = "") -> None:
    (directory / "shop").mkdir(exist_ok=True)
    (directory / "shop" / "__init__.py").touch()
    (directory / "shop" / "models.py").write_text(models)
    path = os.pathsep.join([str(directory), str(ROOT)])
    subprocess.run([sys.executable, "-c", prelude + snippet], env=os.environ | {"PYTHONPATH": path}, check=True)


def written(shop: Shop) -> list[tuple[str, str, object]]:
    return [(message.aggregate_id, message.event_type, message.payload) for message in shop.messages()]


def test_the_psycopg_snippets_write_one_message_and_many(shop: Shop, tmp_path: Path) -> None:
    for snippet in snippets("psycopg", "python"):
        run(snippet, prelude=f"DATABASE_URL = {shop.dsn!r}\n", directory=tmp_path)
    assert written(shop) == [
        ("4712", "order_placed", {"total": 80}),
        ("4712", "parcel_sent", {"parcel": "A"}),
        ("4712", "parcel_sent", {"parcel": "B"}),
    ]
    assert shop.orders() == [4712]


def test_the_sqlalchemy_snippet_writes_order_and_message(shop: Shop, tmp_path: Path) -> None:
    [snippet] = snippets("SQLAlchemy", "python")
    url = shop.dsn.replace("postgresql://", "postgresql+psycopg://")
    run(snippet, prelude=f"DATABASE_URL = {url!r}\n", directory=tmp_path, models=SQLALCHEMY_MODELS)
    assert (shop.orders(), written(shop)) == ([4713], [("4713", "order_placed", {"total": 80})])


def test_the_django_snippet_writes_order_and_message(shop: Shop, tmp_path: Path) -> None:
    [snippet] = snippets("Django", "python")
    server = shop.database.server
    prelude = DJANGO_SETTINGS.format(name=shop.database.name, user=shop.login, port=server.port)
    run(snippet, prelude=prelude, directory=tmp_path, models=DJANGO_MODELS)
    assert (shop.orders(), written(shop)) == ([4714], [("4714", "order_placed", {"total": 80})])


def test_the_sql_snippet_writes_order_and_message(shop: Shop) -> None:
    with shop.database.connect(autocommit=True, user=shop.login) as connection:
        connection.execute(snippets("Every other language", "sql")[0].encode())
    assert (shop.orders(), written(shop)) == ([4715], [("4715", "order_placed", {"total": 80})])


def test_the_printed_signature_is_that_of_the_function() -> None:
    printed = snippets("Every other language", "sql")[1]
    [migration] = [migration for migration in migrate.migrations() if migration.name == "create_outbox_write"]
    assert f"CREATE FUNCTION {printed}".replace(") RETURNS", ")\nRETURNS") in migration.sql


def test_the_deferred_snippet_writes_after_its_change(shop: Shop, tmp_path: Path) -> None:
    with shop.database.connect() as admin:
        admin.execute("INSERT INTO orders (id, total) VALUES (4711, 120)")
    [snippet] = snippets("Insert at the end of the transaction", "python")
    run(snippet, prelude=f"DATABASE_URL = {shop.dsn!r}\n", directory=tmp_path)
    assert written(shop) == [("4711", "order_paid", {"amount": 120})]
    with shop.database.connect() as admin:
        commands = admin.execute("SELECT orders.cmin::text, outbox.cmin::text FROM orders, outbox").fetchall()
    assert commands == [("0", "1")]
