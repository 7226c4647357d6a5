"""What every page and API of danlu shares: the server, its guard, safe Markdown, the page's shell."""
