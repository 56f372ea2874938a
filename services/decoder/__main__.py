from services.decoder.main import main

if __name__ == "__main__":
    main()
