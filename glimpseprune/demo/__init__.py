"""A page in the browser, `glimpseprune demo`: what it does, apart from how `page` lays it out."""
