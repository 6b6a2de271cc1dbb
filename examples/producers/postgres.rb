# An order and its task in one transaction, on PostgreSQL.
require "json"
require "pg"

connection = PG.connect(ENV.fetch("DATABASE_URL"))
connection.exec("CREATE TABLE IF NOT EXISTS orders (number int PRIMARY KEY)")

connection.transaction do
  connection.exec_params("INSERT INTO orders VALUES ($1)", [1])
  connection.exec_params("SELECT laelaps.submit($1, $2, $3)", ["order-1", "ship", JSON.generate(order: 1)])
end

# What is rolled back has never been submitted.
connection.exec("BEGIN")
connection.exec_params("INSERT INTO orders VALUES ($1)", [2])
connection.exec_params("SELECT laelaps.submit($1, $2, $3)", ["order-2", "ship", JSON.generate(order: 2)])
connection.exec("ROLLBACK")
connection.close
