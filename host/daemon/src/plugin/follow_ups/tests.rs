use std::time::Duration;

use laelaps_queue::TaskId;
use proptest::prelude::*;

use super::*;

const CLAIMED_AT: Timestamp = Timestamp(1_700_000_000_000);

fn parent() -> Parent {
    Parent {
        plugin: "thumbs".into(),
        key: "upload-7".to_owned(),
        user: Some("rex".to_owned()),
        max_running: Some(2),
        queue: "images".to_owned(),
        descent: Descent { root: TaskId(5), depth: 3 },
        claimed_at: CLAIMED_AT,
    }
}

fn task(key: &str) -> NewTask {
    NewTask::new(key, "resize", "{}")
}

fn grant(follow_ups: &FollowUps, task: NewTask) -> Result<NewTask, Refused> {
    follow_ups.grant(&parent(), task, |task_type| task_type == "resize")
}

fn code(follow_ups: &FollowUps, task: NewTask) -> &'static str {
    grant(follow_ups, task).expect_err("refused").code
}

#[test]
fn by_default_a_follow_up_is_of_the_plugins_own_types_keys_and_user() {
    let granted = grant(&FollowUps::default(), task("thumbs/7")).expect("granted");
    assert_eq!((granted.user.as_deref(), granted.max_running), (Some("rex"), Some(2)), "its user, within its limit");
    assert_eq!(granted.descent, Some(Descent { root: TaskId(5), depth: 4 }));
    for taken in ["thumbs/", "upload-7", "upload-7-small", "upload-7/small", "upload-7 small", "upload-7\u{2013}small"] {
        assert!(grant(&FollowUps::default(), task(taken)).is_ok(), "{taken}");
    }
    for foreign in
        ["invoice-7", "thumbs", "thumbsup/7", "upload-70", "upload-7a", "upload-7\u{e9}", "upload-", "Thumbs/7", " thumbs/7"]
    {
        assert_eq!(code(&FollowUps::default(), task(foreign)), "not-granted", "{foreign}");
    }
    let other = NewTask { task_type: "pay".to_owned(), ..task("thumbs/7") };
    let refused = grant(&FollowUps::default(), other).expect_err("refused");
    assert_eq!(refused.code, "not-granted");
    assert_eq!(
        refused.message,
        "the type \"pay\" is not one of a route to the same plugin, and not among the types that follow_ups of the route's grants names"
    );
}

#[test]
fn a_follow_up_stays_on_its_users_account_and_within_its_limit() {
    let own = FollowUps::default();
    let of = |user: Option<&str>, max_running| NewTask { user: user.map(str::to_owned), max_running, ..task("thumbs/7") };
    let granted = |user, max_running| grant(&own, of(user, max_running)).map(|task| (task.user, task.max_running)).ok();
    let rex = || Some("rex".to_owned());
    assert_eq!(granted(None, None), Some((rex(), Some(2))));
    assert_eq!(granted(Some(""), None), Some((rex(), Some(2))), "an empty text is none");
    assert_eq!(granted(Some("rex"), Some(1)), Some((rex(), Some(1))));
    assert_eq!(granted(None, Some(0)), Some((rex(), Some(0))));
    assert_eq!(granted(None, Some(3)), None);
    assert_eq!(granted(Some("rex"), Some(3)), None);
    assert_eq!(granted(Some("fido"), None), None);
    let nobody = Parent { user: None, max_running: None, ..parent() };
    let granted = |task| own.grant(&nobody, task, |_| true).map(|task| (task.user, task.max_running)).ok();
    assert_eq!(granted(of(None, Some(9))), Some((None, Some(9))));
    assert_eq!(granted(of(Some("rex"), None)), None);
    let any = FollowUps { users: Users::Any, ..own };
    let task = grant(&any, of(None, None)).expect("granted");
    assert_eq!((task.user, task.max_running), (None, None), "as it was asked for");
    assert!(grant(&any, of(Some("fido"), Some(100))).is_ok());
}

#[test]
fn a_grant_can_name_types_and_keys_or_allow_all() {
    let pay = |key: &str| NewTask { task_type: "pay".to_owned(), ..task(key) };
    let listed = FollowUps { types: Types::Listed(vec!["pay".to_owned()]), ..FollowUps::default() };
    assert!(grant(&listed, pay("thumbs/7")).is_ok());
    assert_eq!(code(&listed, task("thumbs/7")), "not-granted", "the list stands for all, its own types too");
    let prefix = FollowUps { keys: Keys::Prefix("pay-".to_owned()), ..listed };
    assert!(grant(&prefix, pay("pay-7")).is_ok() && grant(&prefix, pay("upload-7.paid")).is_ok());
    assert_eq!(code(&prefix, pay("thumbs/7")), "not-granted");
    let any = FollowUps::of_perfectqueue();
    assert!(grant(&any, pay("invoice-7")).is_ok());
    assert_eq!((any.depth, any.waiting), (FollowUps::default().depth, FollowUps::default().waiting));
}

#[test]
fn a_follow_up_waits_in_its_tasks_own_queue_unless_another_is_granted() {
    let asked = |queue: &str| NewTask { queue: Some(queue.to_owned()), ..task("thumbs/7") };
    let own = FollowUps::default();
    let listed = FollowUps { queues: Queues::Listed(vec!["mail".to_owned()]), ..own.clone() };
    let any = FollowUps { queues: Queues::Any, ..own.clone() };
    for follow_ups in [&own, &listed, &any] {
        for task in [task("thumbs/7"), asked("images")] {
            assert_eq!(grant(follow_ups, task).expect("granted").queue.as_deref(), Some("images"));
        }
    }
    for follow_ups in [&listed, &any] {
        assert_eq!(grant(follow_ups, asked("mail")).expect("granted").queue.as_deref(), Some("mail"));
    }
    assert_eq!(grant(&any, asked("default")).expect("granted").queue.as_deref(), Some("default"));
    assert_eq!(code(&own, asked("mail")), "not-granted");
    let refused = grant(&listed, asked("default")).expect_err("refused");
    assert_eq!(
        (refused.code, refused.message.as_str()),
        (
            "not-granted",
            "the queue \"default\" is neither the task's own, \"images\", nor among those that follow_ups of the route's grants names"
        )
    );
}

#[test]
fn generations_are_bounded_and_start_again_after_a_minute() {
    let depth = |depth, after: Option<u64>| {
        let follow_ups = FollowUps { depth, ..FollowUps::default() };
        let run_at = after.map(|seconds| CLAIMED_AT.plus(Duration::from_secs(seconds)));
        let granted = grant(&follow_ups, NewTask { run_at, ..task("thumbs/7") });
        granted.map(|task| task.descent.expect("its descent").depth).map_err(|refused| refused.code)
    };
    assert_eq!(depth(4, None), Ok(4));
    assert_eq!(depth(3, None), Err("too-deep"));
    assert_eq!(depth(3, Some(30)), Err("too-deep"));
    assert_eq!((depth(3, Some(60)), depth(0, Some(60))), (Ok(0), Ok(0)));
    assert_eq!(depth(0, None), Err("too-deep"));
}

#[test]
fn what_waits_is_bounded() {
    let follow_ups = FollowUps { waiting: 2, ..FollowUps::default() };
    assert_eq!([0, 1, 2, u32::MAX].map(|relatives| follow_ups.room(relatives)), [2, 1, 0, 0]);
    let refused = follow_ups.too_many_waiting();
    assert_eq!(refused.code, "too-many-waiting");
    assert_eq!(
        refused.message,
        "2 follow-ups that come from the same task have not ended, as many as follow_ups of the route's grants allows"
    );
}

proptest! {
    /// Whatever a handler asks for: what is granted by default is of its own type, key, user and limit, and not too deep.
    #[test]
    fn nothing_foreign_is_granted_by_default(
        own in "[a-z0-9-]{1,8}", key in "(thumbs/)?[a-z0-9/-]{1,12}", user in proptest::option::of("(rex|fido|)"), asked in proptest::option::of(0_u32..5),
        most in proptest::option::of(0_u32..5), has_user in any::<bool>(), depth in 0_u32..13, after in proptest::option::of(0_u64..120), kind in "(resize|pay)", queue in proptest::option::of("(images|mail|default)")
    ) {
        let parent = Parent {
            key: own.clone(), user: has_user.then(|| "rex".to_owned()), max_running: most, descent: Descent { root: TaskId(5), depth }, ..parent()
        };
        let run_at = after.map(|seconds| CLAIMED_AT.plus(Duration::from_secs(seconds)));
        let asked = NewTask { user, max_running: asked, run_at, task_type: kind, queue, ..task(&key) };
        if let Ok(granted) = FollowUps::default().grant(&parent, asked.clone(), |task_type| task_type == "resize") {
            prop_assert_eq!(granted.task_type.as_str(), "resize");
            prop_assert!(granted.key == own || granted.key.starts_with("thumbs/") || granted.key.starts_with(&own));
            prop_assert_eq!(granted.user.as_deref().filter(|user| !user.is_empty()), parent.user.as_deref());
            if has_user {
                prop_assert!(granted.max_running.unwrap_or(u32::MAX) <= most.unwrap_or(u32::MAX));
            }
            prop_assert_eq!(granted.queue.as_deref(), Some("images"));
            let descent = granted.descent.expect("its descent");
            prop_assert!(descent.root == TaskId(5) && descent.depth <= 10);
            prop_assert_eq!(NewTask { user: asked.user.clone(), max_running: asked.max_running, queue: asked.queue.clone(), descent: None, ..granted }, asked);
        }
    }
}
