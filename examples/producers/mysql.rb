# An order and its task in one transaction, on MySQL or MariaDB.
require "json"
require "mysql2"
require "uri"

url = URI(ENV.fetch("DATABASE_URL"))
client = Mysql2::Client.new(
  host: url.host, port: url.port || 3306, username: url.user, password: url.password, database: url.path.delete_prefix("/")
)
submit = lambda do |key, data|
  texts = [key, "ship", JSON.generate(data)].map { |text| "'#{client.escape(text)}'" }
  client.query("CALL laelaps_submit(#{texts.join(", ")}, NULL)")
end
client.query("CREATE TABLE IF NOT EXISTS orders (number int PRIMARY KEY)")

client.query("BEGIN")
client.query("INSERT INTO orders VALUES (1)")
submit.call("order-1", { order: 1 })
client.query("COMMIT")

# What is rolled back has never been submitted.
client.query("BEGIN")
client.query("INSERT INTO orders VALUES (2)")
submit.call("order-2", { order: 2 })
client.query("ROLLBACK")
client.close
