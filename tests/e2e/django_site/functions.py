"""What the site can be told to do: through the ORM, and through the admin's pages as a browser would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.contrib.admin.models import LogEntry
from django.contrib.auth import authenticate
from django.contrib.auth.models import Group, Permission, User
from django.core.management import call_command
from django.test import Client


def migrate(*apps: str) -> None:
    call_command("migrate", *apps, verbosity=0, interactive=False)


def create_superuser(name: str, password: str) -> int:
    return User.objects.create_superuser(name, f"{name}@example.org", password).pk


def create_user(name: str, password: str) -> int:
    return User.objects.create_user(name, f"{name}@example.org", password).pk


def edit_user(name: str, fields: dict[str, Any]) -> None:
    user = User.objects.get(username=name)
    for field, value in fields.items():
        setattr(user, field, value)
    user.save(update_fields=list(fields))


def set_password(name: str, password: str) -> None:
    user = User.objects.get(username=name)
    user.set_password(password)
    user.save()


def delete_user(name: str) -> None:
    User.objects.get(username=name).delete()


def join_group(name: str, group: str, permissions: list[str]) -> None:
    """Many-to-many tables: the user joins the group, which gets permissions."""
    joined, _ = Group.objects.get_or_create(name=group)
    joined.permissions.add(*Permission.objects.filter(codename__in=permissions))
    User.objects.get(username=name).groups.add(joined)


def may(name: str, permission: str) -> bool:
    return User.objects.get(username=name).has_perm(permission)


def password_fits(name: str, password: str) -> bool:
    return authenticate(username=name, password=password) is not None


def log_in(name: str, password: str) -> str | None:
    """The key of a new session, made by the admin's own login form; None if it is refused."""
    client = Client()
    answer = client.post("/admin/login/?next=/admin/", {"username": name, "password": password})
    return client.session.session_key if answer.status_code == 302 else None


def session_user(session_key: str) -> str | None:
    """Whose session it is, as the admin's start page sees it; None if it is not good here."""
    answer = _client(session_key).get("/admin/")
    return answer.wsgi_request.user.username if answer.status_code == 200 else None


def admin_add_user(session_key: str, name: str, password: str) -> int:
    data = {"username": name, "password1": password, "password2": password, "usable_password": "true"}
    _submit(session_key, "/admin/auth/user/add/", data)
    return User.objects.get(username=name).pk


def admin_edit_user(session_key: str, name: str, fields: dict[str, Any]) -> None:
    user = User.objects.get(username=name)
    data = {
        "username": user.username,
        "first_name": user.first_name,
        "last_name": user.last_name,
        "email": user.email,
        "is_active": "on",
        "date_joined_0": user.date_joined.strftime("%Y-%m-%d"),
        "date_joined_1": user.date_joined.strftime("%H:%M:%S"),
        **fields,
    }
    _submit(session_key, f"/admin/auth/user/{user.pk}/change/", data)


def admin_delete_user(session_key: str, name: str) -> None:
    user = User.objects.get(username=name)
    _submit(session_key, f"/admin/auth/user/{user.pk}/delete/", {"post": "yes"})


def admin_log() -> list[str]:
    """`who: what`, in a fixed order."""
    entries = LogEntry.objects.select_related("user")
    return sorted(f"{entry.user.username}: {entry}" for entry in entries)


def users() -> list[str]:
    return sorted(User.objects.values_list("username", flat=True))


def _client(session_key: str) -> Client:
    client = Client()
    client.cookies["sessionid"] = session_key
    return client


def _submit(session_key: str, path: str, data: dict[str, Any]) -> None:
    answer = _client(session_key).post(path, data)
    if answer.status_code != 302:
        form = (answer.context_data or {}).get("adminform") if hasattr(answer, "context_data") else None
        raise ValueError(f"{path}: {answer.status_code} {form and form.form.errors}")


COMMANDS: dict[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (
        migrate,
        create_superuser,
        create_user,
        edit_user,
        set_password,
        delete_user,
        join_group,
        may,
        password_fits,
        log_in,
        session_user,
        admin_add_user,
        admin_edit_user,
        admin_delete_user,
        admin_log,
        users,
    )
}
