"""An order and its task in one transaction, on MySQL or MariaDB."""

import json
import os
from urllib.parse import urlsplit

import pymysql

url = urlsplit(os.environ["DATABASE_URL"])
connection = pymysql.connect(
    host=url.hostname, port=url.port or 3306, user=url.username, password=url.password or "", database=url.path[1:], charset="utf8mb4"
)
SUBMIT = "CALL laelaps_submit(%s, %s, %s, NULL)"

with connection, connection.cursor() as cursor:
    cursor.execute("CREATE TABLE IF NOT EXISTS orders (number int PRIMARY KEY)")

    connection.begin()
    cursor.execute("INSERT INTO orders VALUES (%s)", [1])
    cursor.execute(SUBMIT, ["order-1", "ship", json.dumps({"order": 1})])
    connection.commit()

    # What is rolled back has never been submitted.
    connection.begin()
    cursor.execute("INSERT INTO orders VALUES (%s)", [2])
    cursor.execute(SUBMIT, ["order-2", "ship", json.dumps({"order": 2})])
    connection.rollback()
