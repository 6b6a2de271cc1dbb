//! Character sets and collations that hold less than all characters, or tell fewer apart.

use laelaps_queue::{Error, NewTask, State, Submitted};

use crate::fixture::{Site, finish, settled, table, task, with_follow_ups};

/// A site whose table has this character set and collation.
async fn site(side_table: bool, charset: &str) -> Site {
    let site = Site::empty(table(side_table)).await;
    let mut ruby = site.ruby().await;
    ruby.run(&format!(
        "CREATE TABLE {{t}} (id VARCHAR(255) NOT NULL, timeout INT NOT NULL, data LONGBLOB NOT NULL, created_at INT,
            resource VARCHAR(255), max_running INT, owner BIGINT(21) UNSIGNED NOT NULL DEFAULT 0, PRIMARY KEY (id))
            ENGINE=InnoDB DEFAULT CHARSET={charset}"
    ))
    .await;
    site.queue.init().await.unwrap();
    // What tasks the table can hold is known once it was looked at.
    site.queue.stats().await.unwrap();
    site.another().await
}

#[tokio::test]
async fn what_the_columns_cannot_hold_is_refused_and_nothing_is_stored_instead() {
    for (charset, lacks) in [("latin1", "日本"), ("utf8mb3", "😀😀"), ("koi8r", "é日"), ("ascii", "é")] {
        for side_table in [true, false] {
            let site = site(side_table, charset).await;
            let (host, mut ruby) = (site.host().await, site.ruby().await);
            let of_user = NewTask { user: Some(lacks.to_owned()), ..task("of user") };
            let far = site.backend().now().await.unwrap().plus(std::time::Duration::from_secs(3600));
            for refused in [task(lacks), of_user, NewTask { run_at: Some(far), ..task(lacks) }] {
                let told = site.queue.submit_many(&[task("good"), refused.clone()]).await.unwrap_err();
                assert!(matches!(&told, Error::InvalidTask { key, .. } if *key == refused.key), "{charset}: {told:?}");
                assert!(told.to_string().contains(charset), "{told}");
            }
            assert_eq!(ruby.number("SELECT COUNT(*) FROM {t}").await, 0, "{charset}");
            // A follow-up too: its settlement is refused, and changes nothing.
            site.submit(&[task("a")]).await;
            let claimed = site.claim(host, 1).await.remove(0);
            let settlement = with_follow_ups(vec![task("b"), task(lacks)], settled(&claimed, finish()));
            let told = site.backend().settle(&[settlement]).await.unwrap_err();
            assert!(told.is_about_the_request() && told.to_string().contains(charset), "{told}");
            assert_eq!((site.state("a").await, ruby.number("SELECT COUNT(*) FROM {t}").await), (State::Running, 1));
            if charset != "koi8r" {
                assert!(site.backend().check(&task(lacks)).is_err(), "a handler is told at its call");
            }
        }
    }
}

#[tokio::test]
async fn what_the_columns_can_hold_comes_back_as_it_was() {
    for (charset, has) in [("latin1", "é€ÿ"), ("utf8mb3", "日本é"), ("koi8r", "Жук"), ("utf8mb4", "😀"), ("utf16", "😀")]
    {
        let site = site(true, charset).await;
        let host = site.host().await;
        let new = NewTask { user: Some(has.to_owned()), max_attempts: Some(7), ..task(has) };
        assert_eq!(site.queue.submit(new.clone()).await.unwrap(), Submitted::Created, "{charset}");
        assert_eq!(site.queue.submit(new).await.unwrap(), Submitted::AlreadyExists);
        let claimed = site.claim(host, 1).await.remove(0);
        assert_eq!((claimed.key.as_str(), claimed.user.as_deref(), claimed.max_attempts), (has, Some(has), Some(7)), "{charset}");
        site.settle(&claimed, finish()).await;
        assert_eq!(site.state(has).await, State::Finished);
    }
}

#[tokio::test]
async fn check_tells_what_the_table_takes_for_one() {
    for (charset, tells, tells_not) in [
        ("utf8mb4 COLLATE utf8mb4_bin", "at their end", "and \"A\""),
        ("utf8mb4 COLLATE utf8mb4_general_ci", "one emoji", "refused"),
        ("utf8mb4 COLLATE utf8mb4_general_ci", "accents", "refused"),
        ("utf8mb4 COLLATE utf8mb4_nopad_bin", "", "one to the table"),
        ("latin1", "the column id is latin1", "emoji"),
        ("utf8mb3", "the column id is utf8", "emoji"),
    ] {
        let site = site(false, charset).await;
        assert!(site.backend().drift().await.unwrap().is_empty());
        let warnings = site.backend().warnings().await.unwrap().join("; ");
        assert!(warnings.contains(tells) && !warnings.contains(tells_not), "{charset}: {warnings}");
    }
}
