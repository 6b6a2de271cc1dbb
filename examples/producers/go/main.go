// An order and its task in one transaction, on PostgreSQL, MySQL or MariaDB.
package main

import (
	"database/sql"
	"encoding/json"
	"log"
	"net/url"
	"os"
	"strings"

	_ "github.com/go-sql-driver/mysql"
	_ "github.com/jackc/pgx/v5/stdlib"
)

func main() {
	address, err := url.Parse(os.Getenv("DATABASE_URL"))
	check(err)
	driver, source := "pgx", address.String()
	order, submit := "INSERT INTO orders VALUES ($1)", "SELECT laelaps.submit($1, $2, $3)"
	if strings.HasPrefix(address.Scheme, "mysql") || address.Scheme == "mariadb" {
		driver, source = "mysql", address.User.String()+"@tcp("+address.Host+")"+address.Path
		order, submit = "INSERT INTO orders VALUES (?)", "CALL laelaps_submit(?, ?, ?, NULL)"
	}
	database, err := sql.Open(driver, source)
	check(err)
	defer database.Close()
	_, err = database.Exec("CREATE TABLE IF NOT EXISTS orders (number int PRIMARY KEY)")
	check(err)

	// One that is committed; and one that is rolled back, and has never been submitted.
	for number, key := range map[int]string{1: "order-1", 2: "order-2"} {
		transaction, err := database.Begin()
		check(err)
		_, err = transaction.Exec(order, number)
		check(err)
		data, err := json.Marshal(map[string]int{"order": number})
		check(err)
		_, err = transaction.Exec(submit, key, "ship", string(data))
		check(err)
		if number == 1 {
			check(transaction.Commit())
		} else {
			check(transaction.Rollback())
		}
	}
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
