"""Random keys for every model with an AutoField, third-party ones included: docs/applications.md shows this file."""

import secrets

from django.apps import AppConfig
from django.db.models.fields import AutoFieldMixin


class RandomIds(AppConfig):
    name = "tests.e2e.django_site"
    label = "random_ids"

    def ready(self) -> None:
        # save(), bulk_create() and many-to-many tables ask the field for a key; an AutoField leaves it to SQLite.
        AutoFieldMixin.get_pk_value_on_save = lambda field, instance: secrets.randbelow(2**63 - 1) + 1
