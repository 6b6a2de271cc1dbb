"""An order and its task in one transaction, on SQLite."""

import json
import os
import sqlite3

path = os.environ["DATABASE_URL"].removeprefix("sqlite:").removeprefix("//")
# Whoever writes waits until nobody else does.
connection = sqlite3.connect(path, timeout=30)
SUBMIT = "INSERT INTO submit (key, type, data) VALUES (?, ?, ?)"

connection.execute("CREATE TABLE IF NOT EXISTS orders (number INTEGER PRIMARY KEY)")

with connection:
    connection.execute("INSERT INTO orders VALUES (?)", [1])
    connection.execute(SUBMIT, ["order-1", "ship", json.dumps({"order": 1})])

# What is rolled back has never been submitted.
connection.execute("INSERT INTO orders VALUES (?)", [2])
connection.execute(SUBMIT, ["order-2", "ship", json.dumps({"order": 2})])
connection.rollback()
connection.close()
