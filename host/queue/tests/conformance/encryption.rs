//! Encrypted connections to servers, and who the server is.

use std::error::Error as _;
use std::path::Path;

use laelaps_queue::{Config, Connections, Error, Queue, Tls};
use laelaps_test_databases::{Certificates, mariadb, postgres};
use sqlx::{AssertSqlSafe, Connection, MySqlConnection, PgConnection};

use crate::fixture::{patient, task};

/// A task goes to the database and comes back; or what the error, its hint and its causes say.
async fn there_and_back(url: &str, tls: Option<Tls>, authority: Option<&Path>) -> Result<(), String> {
    let connections = Connections { tls, certificate_authority: authority.map(Path::to_path_buf), ..patient() };
    let config = Config { connections, ..Config::new(url) };
    let used = async {
        let queue = Queue::open(&config).await?;
        queue.init().await?;
        let key = format!("{:x}", fastrand::u64(..));
        queue.submit(task(&key)).await?;
        assert!(queue.exists(&key).await?);
        queue.close().await;
        Ok(())
    };
    used.await.map_err(|error: Error| {
        let source = error.source().map(ToString::to_string).unwrap_or_default();
        format!("{error}: {source} ({})", error.hint().unwrap_or_default())
    })
}

/// What every encrypted server has to keep, whose certificate is for `localhost`. `hint` is in what an operator is told.
async fn the_server_is_who_it_has_to_be(at_address: &str, certificates: &Certificates, hint: &str) {
    let at_name = at_address.replace("127.0.0.1", "localhost");
    let authority = certificates.authority();
    let known = Some(authority.as_path());
    let others = Certificates::make();
    let other = others.authority();
    let stranger = Some(other.as_path());
    let let_in = [
        ("encrypted, whoever it is", at_address, Some(Tls::Required), None),
        ("encrypted where the server can", at_address, Some(Tls::Preferred), None),
        ("signed by the authority, under whatever name", at_address, Some(Tls::VerifyAuthority), known),
        ("an authority alone means the same", at_address, None, known),
        ("for this very server", &at_name, Some(Tls::VerifyIdentity), known),
    ];
    for (wanted, url, tls, authority) in let_in {
        assert_eq!(there_and_back(url, tls, authority).await, Ok(()), "{wanted}");
    }
    let refused = [
        ("signed by an authority that is not the machine's", at_address, Some(Tls::VerifyAuthority), None, "UnknownIssuer"),
        ("signed by another authority", at_address, Some(Tls::VerifyAuthority), stranger, "invalid peer certificate"),
        ("another authority alone", at_address, None, stranger, "invalid peer certificate"),
        ("for another name", at_address, Some(Tls::VerifyIdentity), known, "not valid for name"),
        ("another authority, for this very server", &at_name, Some(Tls::VerifyIdentity), stranger, "invalid peer certificate"),
    ];
    for (wanted, url, tls, authority, words) in refused {
        let told = there_and_back(url, tls, authority).await.expect_err(wanted);
        assert!(told.starts_with("cannot connect to ") && told.contains(words) && told.contains(hint), "{wanted}: {told}");
    }
}

mod on_postgres {
    use super::*;

    #[tokio::test]
    async fn the_server_is_who_it_has_to_be() {
        let server = postgres::Server::start_encrypted().await;
        let url = server.create_database().await;
        super::the_server_is_who_it_has_to_be(&url, server.certificates(), "check sslmode and certificates").await;
    }

    #[tokio::test]
    async fn a_connection_is_encrypted_where_the_server_can_unless_that_is_not_wanted() {
        let server = postgres::Server::start_encrypted().await;
        let url = server.create_database().await;
        for (tls, encrypted) in [(None, true), (Some(Tls::Required), true), (Some(Tls::Disabled), false)] {
            let connections = Connections { tls, ..patient() };
            let queue = Queue::open(&Config { connections, ..Config::new(&url) }).await.unwrap();
            const SEEN: &str = "SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
                WHERE datname = current_database() AND application_name = 'laelaps'";
            let mut connection = PgConnection::connect(&url).await.unwrap();
            let seen: Option<bool> = sqlx::query_scalar(SEEN).fetch_one(&mut connection).await.unwrap();
            assert_eq!(seen, Some(encrypted), "{tls:?}");
            queue.close().await;
            gone(&mut connection).await;
        }
    }

    /// A session ends a moment after its client has gone.
    async fn gone(connection: &mut PgConnection) {
        const LEFT: &str =
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'laelaps'";
        laelaps_test_databases::eventually(laelaps_test_databases::PATIENCE, "the sessions end", async || {
            let left: i64 = sqlx::query_scalar(LEFT).fetch_one(&mut *connection).await.unwrap();
            if left == 0 { Ok(()) } else { Err(left.to_string()) }
        })
        .await;
    }
}

mod on_mariadb {
    use super::*;

    #[tokio::test]
    async fn the_server_is_who_it_has_to_be() {
        let server = mariadb::Server::start_encrypted().await;
        let url = server.create_database().await;
        super::the_server_is_who_it_has_to_be(&url, server.certificates(), "its certificate is not trusted").await;
    }

    #[tokio::test]
    async fn a_connection_is_encrypted_where_the_server_can_unless_that_is_not_wanted() {
        let server = mariadb::Server::start_encrypted().await;
        let url = server.create_database().await;
        let mut root = MySqlConnection::connect(&server.url("mysql")).await.unwrap();
        let database = url.rsplit_once('/').unwrap().1;
        let user = format!("CREATE USER safe@'127.0.0.1' REQUIRE SSL; GRANT ALL ON {database}.* TO safe@'127.0.0.1'");
        sqlx::raw_sql(AssertSqlSafe(user)).execute(&mut root).await.unwrap();
        let url = url.replace("root@", "safe@");
        for tls in [None, Some(Tls::Preferred), Some(Tls::Required)] {
            assert_eq!(there_and_back(&url, tls, None).await, Ok(()), "{tls:?}");
        }
        let told = there_and_back(&url, Some(Tls::Disabled), None).await.unwrap_err();
        assert!(told.contains("Access denied"), "{told}");
    }
}
