// An order and its task in one transaction, on MySQL or MariaDB.
import mysql from "mysql2/promise";

const connection = await mysql.createConnection(process.env.DATABASE_URL);
const submit = "CALL laelaps_submit(?, ?, ?, NULL)";
await connection.query("CREATE TABLE IF NOT EXISTS orders (number int PRIMARY KEY)");

await connection.beginTransaction();
await connection.query("INSERT INTO orders VALUES (?)", [1]);
await connection.query(submit, ["order-1", "ship", JSON.stringify({ order: 1 })]);
await connection.commit();

// What is rolled back has never been submitted.
await connection.beginTransaction();
await connection.query("INSERT INTO orders VALUES (?)", [2]);
await connection.query(submit, ["order-2", "ship", JSON.stringify({ order: 2 })]);
await connection.rollback();

await connection.end();
