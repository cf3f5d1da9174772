def write_page(results, page):
    raise NotImplementedError
