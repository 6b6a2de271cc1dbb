//! Who a host is: never twice the same.

use std::str::FromStr;

use crate::{Error, SessionId};

/// A session and the transaction that made its first timer. Servers do not give a session's number twice, but ones that lost their data
/// may; together with the transaction it does not come again. Printed as two hexadecimal numbers, `0x1000a2b3c4d0000-0x2f`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    /// The session.
    pub session: SessionId,
    /// The transaction that made the first timer under it.
    pub czxid: i64,
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{:#x}", self.session, self.czxid)
    }
}

impl FromStr for Identity {
    type Err = Error;

    fn from_str(text: &str) -> Result<Identity, Error> {
        let wrong = || Error::config("identity", text, "expected two hexadecimal numbers, such as 0x1000a2b3c4d0000-0x2f");
        let (session, czxid) = text.split_once('-').ok_or_else(wrong)?;
        let number = |text: &str| {
            let digits = text.strip_prefix("0x")?;
            // Printed as two's complement: the highest server numbers make a session's number negative.
            u64::from_str_radix(digits, 16).ok().map(u64::cast_signed)
        };
        Ok(Identity { session: SessionId(number(session).ok_or_else(wrong)?), czxid: number(czxid).ok_or_else(wrong)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_read_back_as_it_was_printed() {
        for (session, czxid) in [(0x0100_0a2b_3c4d_0000, 0x2f), (-2, 1), (i64::MIN, i64::MAX)] {
            let identity = Identity { session: SessionId(session), czxid };
            assert_eq!(identity.to_string().parse::<Identity>().unwrap(), identity);
        }
        for wrong in ["", "0x1", "1-2", "0x1-2", "0xg-0x1", "0x1-0x2-0x3"] {
            assert!(wrong.parse::<Identity>().is_err(), "{wrong:?} was taken");
        }
    }
}
