//! Many tasks at once, written by SQL as the crate would leave them: five million submits would take an hour. That they are the same is a
//! test (`tests/scale`).

mod mariadb;
mod postgres;
mod sqlite;

use std::ops::Range;

/// 100 bytes, as in the measurements that chose the layout.
pub(crate) const DATA: &str =
    r#"{"payload":"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}"#;

/// Tasks of one transaction.
const CHUNK: i64 = 100_000;
/// Ended tasks that share a row of `retention`, as after settlements in groups of so many.
const ENDED_TOGETHER: i64 = 500;

/// Waiting tasks `task-N` for each number. N modulo `users` is the user's number; without users they are nobody's, and with as many users as
/// there are numbers each is another one's.
pub(crate) async fn waiting(url: &str, numbers: Range<usize>, users: usize) {
    waiting_in(url, numbers, users, 1).await;
}

/// As [`waiting`], of so many types in so many queues: N modulo `queues` is the number of both, and what remains of N counts for the user. One
/// queue is the default one.
pub(crate) async fn waiting_in(url: &str, numbers: Range<usize>, users: usize, queues: usize) {
    let number = |number| i64::try_from(number).unwrap_or(i64::MAX);
    let (users, queues) = (number(users), number(queues));
    for (first, last) in chunks(numbers) {
        match url.split(':').next() {
            Some("sqlite") => sqlite::waiting(url, first, last, users, queues).await,
            Some("postgres") => postgres::waiting(url, first, last, users, queues).await,
            _ => mariadb::waiting(url, first, last, users, queues).await,
        }
    }
}

/// Finished tasks `ended-N` whose retention is over.
pub(crate) async fn finished(url: &str, count: usize) {
    for (first, last) in chunks(0..count) {
        match url.split(':').next() {
            Some("sqlite") => sqlite::finished(url, first, last).await,
            Some("postgres") => postgres::finished(url, first, last).await,
            _ => mariadb::finished(url, first, last).await,
        }
    }
}

/// First and last number of each transaction.
fn chunks(numbers: Range<usize>) -> impl Iterator<Item = (i64, i64)> {
    let (begin, end) = (i64::try_from(numbers.start).expect("few enough"), i64::try_from(numbers.end).expect("few enough"));
    let size = usize::try_from(CHUNK).expect("a small number");
    (begin..end).step_by(size).map(move |first| (first, end.min(first + CHUNK) - 1))
}
