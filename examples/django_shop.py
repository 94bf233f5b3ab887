"""
A shop with Django, in one file: an order leaves through the outbox, and its points arrive once through the inbox.

    python -m examples.django_shop create-tables
    python -m examples.django_shop runserver     # curl -d '{"customer": "ada", "cents": 1250}' localhost:8000/orders
    python -m examples.django_shop listen

DATABASE_URL names a database with the tables of the outbox and the inbox (`outbox-relay migrate apply`, with and
without --inbox) and a relay; `listen` takes the messages of the topic `order.events` at KAFKA_BOOTSTRAP_SERVERS.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

import django
from django.conf import settings
from django.core.management import execute_from_command_line
from django.db import connection, models, transaction
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.views.decorators.http import require_POST
from psycopg.conninfo import conninfo_to_dict

from examples.listen import listen
from outbox_relay.consumer import Inbox, message_from
from outbox_relay.writer import Message
from outbox_relay.writer.django import Outbox

if TYPE_CHECKING:
    from outbox_relay.consumer import Record

database = conninfo_to_dict(os.environ["DATABASE_URL"])
settings.configure(
    ALLOWED_HOSTS=["localhost", "127.0.0.1"],
    ROOT_URLCONF=__name__,
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "HOST": database.get("host"),
            "PORT": database.get("port"),
            "NAME": database.get("dbname"),
            "USER": database.get("user"),
            "PASSWORD": database.get("password"),
        }
    },
)
django.setup()

outbox = Outbox()
inbox = Inbox("loyalty")


class Order(models.Model):  # type: ignore[misc]  # Django has no types
    """What a customer has ordered."""

    customer = models.TextField()
    cents = models.IntegerField()

    class Meta:  # noqa: D106 -- Django's
        app_label = "shop"
        db_table = "orders"

    def __str__(self) -> str:
        return f"order {self.pk} of {self.customer}"


class Account(models.Model):  # type: ignore[misc]  # the same
    """How many points a customer has: one for every whole euro."""

    customer = models.TextField(primary_key=True)
    points = models.IntegerField()

    class Meta:  # noqa: D106 -- Django's
        app_label = "shop"
        db_table = "account"

    def __str__(self) -> str:
        return f"{self.points} points of {self.customer}"


@require_POST  # type: ignore[untyped-decorator]  # the same
def place_order(request: HttpRequest) -> JsonResponse:
    """Take an order and give its number; it is committed together with its message, or neither is."""
    wanted = json.loads(request.body)
    with transaction.atomic():
        order = Order.objects.create(customer=wanted["customer"], cents=wanted["cents"])
        outbox.write(
            Message(
                aggregate_type="order",
                aggregate_id=str(order.pk),
                event_type="order_placed",
                payload={"customer": order.customer, "cents": order.cents},
            )
        )
    return JsonResponse({"order": order.pk}, status=201)


urlpatterns = [path("orders", place_order)]


def grant_points(record: Record) -> None:
    """Grant the points of an order, once however often its record is delivered."""
    message = message_from(record)
    with transaction.atomic():
        if inbox.accept(connection.connection, message):
            order = json.loads(message.payload or b"")
            account, _ = Account.objects.get_or_create(customer=order["customer"], defaults={"points": 0})
            Account.objects.filter(pk=account.pk).update(points=models.F("points") + order["cents"] // 100)


def main() -> None:
    """Do what the command line says."""
    match sys.argv[1:]:
        case ["create-tables"]:
            with connection.schema_editor() as editor:
                editor.create_model(Order)
                editor.create_model(Account)
        case ["listen"]:
            listen(grant_points)
        case _:
            execute_from_command_line(sys.argv)


if __name__ == "__main__":
    main()
