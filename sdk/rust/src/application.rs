//! How a handler is run, in a component and in a test alike.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Context, Decider, DefaultDecider, Error, Outcome, Result, decider};

/// A handler with steps around its work, in the manner of PerfectQueue's applications.
///
/// A fresh one is made by `Default` for every attempt. `#[handler]` on the `impl` block makes it the component's handler:
///
/// ```
/// use laelaps_plugin::{Application, Context, Outcome, Result, handler};
///
/// #[derive(serde::Deserialize)]
/// struct Order {
///     items: Vec<String>,
/// }
///
/// #[derive(Default)]
/// struct Shop;
///
/// #[handler]
/// impl Application for Shop {
///     type Data = Order;
///
///     fn before_perform(&mut self, _order: &Order, context: &Context) -> Result<bool> {
///         Ok(context.setting("closed").is_none())
///     }
///
///     fn perform(&mut self, order: Order, _context: &Context) -> Result<Outcome> {
///         Ok(Outcome::finish(order.items.len()))
///     }
/// }
/// # fn main() {}
/// ```
pub trait Application {
    /// The shape of the task's data. Data of another shape is rejected with code `bad-data` before anything runs.
    type Data: DeserializeOwned;

    /// Whether to do the work at all. With `false` neither [`perform`](Self::perform) nor [`after_perform`](Self::after_perform) runs, and
    /// the task is released: it waits again, and the attempt does not count.
    ///
    /// # Errors
    /// Any: the decider has the next word.
    fn before_perform(&mut self, data: &Self::Data, context: &Context) -> Result<bool> {
        let _ = (data, context);
        Ok(true)
    }

    /// The work.
    ///
    /// # Errors
    /// Any: the decider has the next word, after [`after_perform`](Self::after_perform).
    fn perform(&mut self, data: Self::Data, context: &Context) -> Result<Outcome>;

    /// What is done after the work, however it went. Only a panic goes past it: that is a trap, after which nothing of a component runs.
    ///
    /// # Errors
    /// Any: it takes the place of what `perform` answered, unless that was an error, which then stays and this one is logged.
    fn after_perform(&mut self, context: &Context) -> Result<()> {
        let _ = context;
        Ok(())
    }

    /// Who answers decisions.
    fn decider(&self) -> Box<dyn Decider> {
        Box::new(DefaultDecider)
    }

    /// Has the decider answer the decision of this name: `return self.decide("quota_exceeded", json!({ "wait": 60 }), context)`.
    ///
    /// # Errors
    /// Code `undefined-decision` if the decider does not know it, and whatever the decision answers.
    fn decide(&self, name: &str, options: impl Serialize, context: &Context) -> Result<Outcome>
    where
        Self: Sized,
    {
        let options = decider::options(options)?;
        if name == decider::UNEXPECTED_ERROR_RAISED {
            return self.decider().unexpected_error_raised(decider::described_error(&options), context);
        }
        self.decider().decide(name, options, context)
    }
}

/// What a handler function may return beside its error: an [`Outcome`], or a result that serialises, with which the task is finished.
///
/// A result that serialises to `null`, such as `()`, is no output.
pub trait IntoOutcome {
    /// The outcome that it stands for.
    ///
    /// # Errors
    /// Code `bad-output`, rejecting, if it has no JSON form.
    fn into_outcome(self) -> Result<Outcome>;
}

impl IntoOutcome for Outcome {
    fn into_outcome(self) -> Result<Outcome> {
        Ok(self)
    }
}

impl<T: Serialize> IntoOutcome for T {
    fn into_outcome(self) -> Result<Outcome> {
        Ok(match Outcome::try_finish(self)? {
            Outcome::Finish { output: Some(output), .. } if output == b"null" => Outcome::done(),
            outcome => outcome,
        })
    }
}

/// A function that can handle tasks: of the data and a `&Context`, of one of them, or of nothing.
///
/// `Parameters` only tells the forms apart; it is never named.
pub trait Handler<Parameters> {
    /// Handles one attempt.
    ///
    /// # Errors
    /// Code `bad-data` if the task's data does not fit, and whatever the function answers.
    fn handle(self, context: &Context) -> Result<Outcome>;
}

/// How [`Handler`] tells functions of data and context from the others.
#[doc(hidden)]
pub struct DataAndContext<D>(D);
#[doc(hidden)]
pub struct DataOnly<D>(D);
#[doc(hidden)]
pub struct ContextOnly;
#[doc(hidden)]
pub struct Nothing;

impl<F, D, T, E> Handler<DataAndContext<D>> for F
where
    F: FnOnce(D, &Context) -> Result<T, E>,
    D: DeserializeOwned,
    T: IntoOutcome,
    E: Into<Error>,
{
    fn handle(self, context: &Context) -> Result<Outcome> {
        run(context, self)
    }
}

impl<F, D, T, E> Handler<DataOnly<D>> for F
where
    F: FnOnce(D) -> Result<T, E>,
    D: DeserializeOwned,
    T: IntoOutcome,
    E: Into<Error>,
{
    fn handle(self, context: &Context) -> Result<Outcome> {
        run(context, |data, _| self(data))
    }
}

impl<F, T, E> Handler<ContextOnly> for F
where
    F: FnOnce(&Context) -> Result<T, E>,
    T: IntoOutcome,
    E: Into<Error>,
{
    fn handle(self, context: &Context) -> Result<Outcome> {
        answer(self(context))
    }
}

impl<F, T, E> Handler<Nothing> for F
where
    F: FnOnce() -> Result<T, E>,
    T: IntoOutcome,
    E: Into<Error>,
{
    fn handle(self, _context: &Context) -> Result<Outcome> {
        answer(self())
    }
}

/// Runs a handler function for one attempt.
///
/// # Errors
/// Code `bad-data` if the task's data does not fit, and whatever the function answers.
pub fn run<D, T, E>(context: &Context, function: impl FnOnce(D, &Context) -> Result<T, E>) -> Result<Outcome>
where
    D: DeserializeOwned,
    T: IntoOutcome,
    E: Into<Error>,
{
    let data = context.task().data()?;
    answer(function(data, context))
}

/// What a handler function returned, as the outcome that it stands for.
///
/// # Errors
/// The function's, and that of [`IntoOutcome`].
pub fn answer<T: IntoOutcome, E: Into<Error>>(returned: Result<T, E>) -> Result<Outcome> {
    returned.map_err(Into::into)?.into_outcome()
}

/// Runs an application for one attempt: its steps, in order, and its decider on what goes wrong in them.
///
/// # Errors
/// Code `bad-data` if the task's data does not fit, and whatever application and decider answer.
pub fn run_application<A: Application + Default>(context: &Context) -> Result<Outcome> {
    let data = context.task().data()?;
    let mut application = A::default();
    steps(&mut application, data, context).or_else(|error| application.decider().unexpected_error_raised(error, context))
}

fn steps<A: Application>(application: &mut A, data: A::Data, context: &Context) -> Result<Outcome> {
    if !application.before_perform(&data, context)? {
        return Ok(Outcome::release());
    }
    let performed = application.perform(data, context);
    match (performed, application.after_perform(context)) {
        (performed, Ok(())) => performed,
        (Ok(_), Err(after)) => Err(after),
        (Err(performed), Err(after)) => {
            crate::error!("after_perform failed too, and what perform failed with is kept: {after}");
            Err(performed)
        }
    }
}
