// An order and its task in one transaction, on PostgreSQL.
import pg from "pg";

const client = new pg.Client({ connectionString: process.env.DATABASE_URL });
await client.connect();
await client.query("CREATE TABLE IF NOT EXISTS orders (number int PRIMARY KEY)");

await client.query("BEGIN");
await client.query("INSERT INTO orders VALUES ($1)", [1]);
await client.query("SELECT laelaps.submit($1, $2, $3)", ["order-1", "ship", JSON.stringify({ order: 1 })]);
await client.query("COMMIT");

// What is rolled back has never been submitted.
await client.query("BEGIN");
await client.query("INSERT INTO orders VALUES ($1)", [2]);
await client.query("SELECT laelaps.submit($1, $2, $3)", ["order-2", "ship", JSON.stringify({ order: 2 })]);
await client.query("ROLLBACK");

await client.end();
