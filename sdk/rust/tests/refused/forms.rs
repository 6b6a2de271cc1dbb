#![allow(unused_imports)]

use laelaps_plugin::{Context, Outcome, Result, decider, handler};

mod is_async {
    #[super::handler]
    async fn handle() -> super::Result<()> {
        Ok(())
    }
}

mod returns_nothing {
    #[super::handler]
    fn handle() {}
}

mod borrows_data {
    #[super::handler]
    fn handle(data: &str) -> super::Result<()> {
        Ok(())
    }
}

mod owns_context {
    #[super::handler]
    fn handle(context: super::Context) -> super::Result<()> {
        Ok(())
    }
}

mod wrong_order {
    use super::Context;

    #[super::handler]
    fn handle(context: &Context, data: String) -> super::Result<()> {
        Ok(())
    }
}

mod is_generic {
    #[super::handler]
    fn handle<T>(data: T) -> super::Result<()> {
        Ok(())
    }
}

mod is_a_struct {
    #[super::handler]
    struct Handler;
}

mod is_an_inherent_impl {
    struct Shop;

    #[super::handler]
    impl Shop {}
}

mod is_another_trait {
    #[derive(Clone)]
    struct Shop;

    #[super::handler]
    impl Default for Shop {
        fn default() -> Self {
            Shop
        }
    }
}

mod decides_on_a_trait {
    struct Shop;

    #[super::decider]
    impl Default for Shop {
        fn default() -> Self {
            Shop
        }
    }
}

mod decides_by_reference {
    struct Decisions;

    #[super::decider]
    impl Decisions {
        fn late(&self, options: &str) -> super::Result<super::Outcome> {
            Ok(super::Outcome::done())
        }
    }
}

fn main() {}
