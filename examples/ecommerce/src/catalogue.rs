//! What the shop sells: ids and prices. How many are there is the inventory's business.

use crate::events::Cents;

/// A product on offer.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// How orders name it.
    pub id: &'static str,
    /// What one piece costs.
    pub price: Cents,
}

/// Everything on offer.
pub const PRODUCTS: [Product; 10] = [
    product("mug-blue", 1_290),
    product("mug-white", 1_190),
    product("teapot", 3_900),
    product("kettle", 6_450),
    product("tea-assam", 980),
    product("tea-sencha", 1_420),
    product("tray-oak", 2_800),
    product("strainer", 750),
    product("timer", 595),
    product(LIMITED, 12_000),
];

/// The one product of which there are never enough.
pub const LIMITED: &str = "poster-signed";

const fn product(id: &'static str, cents: u64) -> Product {
    Product {
        id,
        price: Cents(cents),
    }
}

/// Finds a product by its id.
pub fn find(id: &str) -> Option<&'static Product> {
    PRODUCTS.iter().find(|product| product.id == id)
}
