//! What `tests/bench storage` shows at full size, at a tenth and below: claims from a large backlog, under an old transaction, and beside
//! many tasks that have ended. A time is held against another one of the same run, five times as far from it as was promised: whatever else a
//! machine does slows down both. One at a time, so that none is measured beside another.

#![expect(clippy::unwrap_used, reason = "a test may stop where it stands")]

#[path = "../../benches/storage/fill/mod.rs"]
mod fill;
mod filled;
mod large;
mod pinned;
mod site;

/// Each promise on each database.
macro_rules! on_every_database {
    ($($module:ident :: $name:ident),+ $(,)?) => {
        on_every_database!(@ on_sqlite Sqlite $($module $name)+);
        on_every_database!(@ on_postgres Postgres $($module $name)+);
        on_every_database!(@ on_mariadb MariaDb $($module $name)+);
    };
    (@ $database:ident $variant:ident $($module:ident $name:ident)+) => {
        mod $database {
            $(#[tokio::test]
            async fn $name() {
                crate::$module::$name(&crate::site::Turn::on(crate::site::Database::$variant).await).await;
            })+
        }
    };
}

on_every_database! {
    filled::a_backlog_that_was_filled_is_one_that_was_submitted,
    filled::ended_tasks_that_were_filled_are_listed_and_removed,
    large::a_claim_costs_the_same_at_any_backlog,
    large::many_ended_tasks_slow_nothing_down,
}
