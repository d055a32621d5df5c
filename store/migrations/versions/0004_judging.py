"""Benchmarks and what they read, what people said of decisions, and export parity get tables of their own."""

import sqlalchemy as sa
from alembic import op
from sqlmodel.sql.sqltypes import AutoString, UTCDateTime

revision = "0004"
down_revision = "0003"


def _column(name: str, kind: sa.types.TypeEngine, null: bool = False) -> sa.Column:
    return sa.Column(name, kind, nullable=null)


def upgrade() -> None:
    """Apply the change."""
    op.create_table(
        "benchmark",
        _column("id", sa.Integer()),
        *(_column(name, AutoString()) for name in ("name", "key")),
        _column("version", sa.Integer()),
        _column("kind", AutoString()),
        _column("settings", sa.JSON()),
        _column("object", AutoString()),
        _column("validation_items", sa.Integer()),
        _column("test_items", sa.Integer()),
        _column("source", AutoString()),
        _column("report", sa.JSON()),
        _column("by", AutoString()),
        _column("created_at", UTCDateTime()),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("key", "version"),
    )
    op.create_table(
        "benchmark_reading",
        _column("id", sa.Integer()),
        _column("benchmark_id", sa.Integer()),
        _column("version_id", sa.Integer(), null=True),
        *(_column(name, AutoString()) for name in ("endpoint", "split", "on", "backend", "key")),
        *(_column(name, sa.Float()) for name in ("value", "low", "high")),
        _column("unit", AutoString()),
        _column("lower_is_better", sa.Boolean()),
        _column("items", sa.Integer()),
        _column("figures", sa.JSON()),
        _column("settings", sa.JSON()),
        _column("object", AutoString()),
        _column("seconds", sa.Float()),
        _column("created_at", UTCDateTime()),
        sa.ForeignKeyConstraint(["benchmark_id"], ["benchmark.id"]),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "approval",
        _column("id", sa.Integer()),
        _column("decision_id", sa.Integer()),
        _column("version_id", sa.Integer()),
        *(_column(name, AutoString()) for name in ("says", "by", "reason")),
        _column("at", UTCDateTime()),
        sa.ForeignKeyConstraint(["decision_id"], ["decision.id"]),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "parity_reading",
        _column("id", sa.Integer()),
        _column("version_id", sa.Integer()),
        *(_column(name, AutoString()) for name in ("backend", "verdict", "sentence")),
        _column("evidence", sa.JSON()),
        _column("seconds", sa.Float()),
        _column("created_at", UTCDateTime()),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    for table, column in (
        ("benchmark", "key"), ("benchmark_reading", "benchmark_id"), ("benchmark_reading", "version_id"),
        ("benchmark_reading", "key"), ("approval", "decision_id"), ("approval", "version_id"),
        ("parity_reading", "version_id"),
    ):  # fmt: skip
        op.create_index(f"ix_{table}_{column}", table, [column], unique=False)
