"""An order and its task in one transaction, on PostgreSQL."""

import json
import os

import psycopg

with psycopg.connect(os.environ["DATABASE_URL"]) as connection:
    connection.execute("CREATE TABLE IF NOT EXISTS orders (number int PRIMARY KEY)")
    connection.commit()

    with connection.transaction():
        connection.execute("INSERT INTO orders VALUES (%s)", [1])
        connection.execute("SELECT laelaps.submit(%s, %s, %s)", ["order-1", "ship", json.dumps({"order": 1})])

    # What is rolled back has never been submitted.
    with connection.transaction(force_rollback=True):
        connection.execute("INSERT INTO orders VALUES (%s)", [2])
        connection.execute("SELECT laelaps.submit(%s, %s, %s)", ["order-2", "ship", json.dumps({"order": 2})])
